// Graphs: operations that were captured instead of run.
#include <algorithm>

#include "streams.hpp"

namespace emulator {
namespace {

struct Graph {
  Operations operations;
};

/// Graphs, or instantiations of graphs; a handle is the address of one.
template <class Handle>
class Graphs {
 public:
  Handle add(Operations operations) {
    all_.push_back(std::make_unique<Graph>(Graph{std::move(operations)}));
    return reinterpret_cast<Handle>(all_.back().get());
  }
  const Graph* find(Handle handle) const {
    for (const auto& graph : all_)
      if (reinterpret_cast<Handle>(graph.get()) == handle) return graph.get();
    return nullptr;
  }
  cudaError_t remove(Handle handle) {
    const Graph* const graph = find(handle);
    if (!graph) return cudaErrorInvalidValue;
    all_.erase(std::find_if(all_.begin(), all_.end(),
                            [=](const auto& each) { return each.get() == graph; }));
    return cudaSuccess;
  }

 private:
  std::vector<std::unique_ptr<Graph>> all_;
};

Graphs<cudaGraph_t>& graphs() {
  static auto* all = new Graphs<cudaGraph_t>;
  return *all;
}
Graphs<cudaGraphExec_t>& execs() {
  static auto* all = new Graphs<cudaGraphExec_t>;
  return *all;
}

}  // namespace
}  // namespace emulator

using namespace emulator;

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return call("cudaStreamIsCapturing", [=] {
    Stream* const stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    for (const Stream* other : all_streams())
      if (stream->legacy && other->capture && other->blocking && other->device == stream->device)
        return cudaErrorStreamCaptureImplicit;
    *status = !stream->capture         ? cudaStreamCaptureStatusNone
              : stream->capture->valid ? cudaStreamCaptureStatusActive
                                       : cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return call("cudaStreamBeginCapture", [=] {
    Stream* const stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (stream->legacy) return cudaErrorStreamCaptureUnsupported;
    if (stream->capture) return cudaErrorIllegalState;
    stream->capture = std::make_unique<Capture>(Capture{mode, std::this_thread::get_id()});
    return cudaSuccess;
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  *graph = nullptr;
  return call("cudaStreamEndCapture", [=] {
    Stream* const stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    if (!stream->capture) return cudaErrorIllegalState;
    if (stream->capture->mode != cudaStreamCaptureModeRelaxed &&
        stream->capture->thread != std::this_thread::get_id())
      return cudaErrorStreamCaptureWrongThread;
    const std::unique_ptr<Capture> capture = std::move(stream->capture);
    if (!capture->valid) return cudaErrorStreamCaptureInvalidated;
    *graph = graphs().add(std::move(capture->operations));
    return cudaSuccess;
  });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return call("cudaThreadExchangeStreamCaptureMode", [=] {
    std::swap(*mode, host_thread().mode);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, std::size_t* count) {
  return call("cudaGraphGetNodes", [=] {
    const Graph* const found = graphs().find(graph);
    if (!found) return cudaErrorInvalidValue;
    const std::size_t size = found->operations.size();
    for (std::size_t i = 0; nodes && i < *count && i < size; ++i)
      nodes[i] = reinterpret_cast<cudaGraphNode_t>(const_cast<Operation*>(&found->operations[i]));
    *count = nodes ? std::min(*count, size) : size;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  return call("cudaGraphNodeGetType", [=] {
    *type = reinterpret_cast<const Operation*>(node)->type;
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph,
                                 unsigned long long /*flags*/) {
  return call("cudaGraphInstantiate", [=] {
    const Graph* const found = graphs().find(graph);
    if (!found) return cudaErrorInvalidValue;
    *out = execs().add(found->operations);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  return call("cudaGraphLaunch", [=] {
    const Graph* const found = execs().find(exec);
    Stream* const stream = find_stream(handle);
    if (!found) return cudaErrorInvalidValue;
    if (!stream) return cudaErrorInvalidResourceHandle;
    const cudaError_t error = check_stream(*stream, false);
    if (error != cudaSuccess) return error;
    for (const Operation& operation : found->operations) enqueue(*stream, operation);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return call("cudaGraphExecDestroy", [=] { return execs().remove(exec); });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return call("cudaGraphDestroy", [=] { return graphs().remove(graph); });
}
