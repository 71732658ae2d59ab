// Operations: what kernels, copies and fills do, at their call and when they run.
#include <cstring>

#include "streams.hpp"

namespace emulator {
namespace {

void break_down(cudaError_t error, const std::string& what) {
  machine().blame(what);
  machine().broken = error;
}

void execute_kernel(const Operation& operation) {
  Machine& m = machine();
  m.executed.push_back(operation.name);
  const cudaError_t ordered = m.count("kernel");
  if (ordered != cudaSuccess) {
    ++m.kernel_errors;
    m.broken = ordered;
    return;
  }
  const Schedule schedule{static_cast<Schedule::Order>(m.settings.order),
                          static_cast<std::uint64_t>(m.settings.seed) * 1000003 + m.executed.size(),
                          static_cast<int>(m.settings.workers)};
  const std::string fault = run(operation.kernel, schedule);
  if (fault.empty()) return;
  ++m.kernel_errors;
  break_down(cudaErrorLaunchFailure, "kernel " + operation.name + ", " + fault);
}

void execute_copy(const Operation& operation) {
  if ((operation.to_device && !is_device_memory(operation.to, operation.bytes)) ||
      (operation.from_device && !is_device_memory(operation.from, operation.bytes)))
    return break_down(cudaErrorIllegalAddress, "a copy of memory that has been freed meanwhile");
  const void* from = operation.staged ? operation.staged->data() : operation.from;
  std::memcpy(operation.to, from, operation.bytes);
  machine().bytes_copied += static_cast<std::int64_t>(operation.bytes);
}

void execute_fill(const Operation& operation) {
  if (!is_device_memory(operation.to, operation.bytes))
    return break_down(cudaErrorIllegalAddress, "a fill of memory that has been freed meanwhile");
  std::memset(operation.to, operation.value, operation.bytes);
  machine().bytes_set += static_cast<std::int64_t>(operation.bytes);
}

bool is_valid(dim3 grid, dim3 block) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  return threads >= 1 && threads <= 1024 && block.z <= 64 && grid.x >= 1 && grid.y >= 1 &&
         grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
}

/// Whether memory is where the call says it is.
cudaError_t check_side(const char* function, const char* side, const void* memory,
                       std::size_t bytes, bool on_device) {
  if (is_device_memory(memory, on_device ? bytes : 1) == on_device) return cudaSuccess;
  machine().blame(std::string(function) + ": the " + side + " is " +
                  (on_device ? "not within memory of a device" : "memory of a device"));
  return cudaErrorInvalidValue;
}

/// A copy that the stream may take; `capturing`: it is for a graph.
cudaError_t make_copy(const char* function, void* to, const void* from, std::size_t bytes,
                      cudaMemcpyKind kind, bool capturing, Operation* out) {
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault)
    return cudaErrorInvalidMemcpyDirection;
  const bool known = kind != cudaMemcpyDefault;
  const bool to_device = known ? kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice
                               : is_device_memory(to, 1);
  const bool from_device = known
                               ? kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice
                               : is_device_memory(from, 1);
  cudaError_t error = check_side(function, "destination", to, bytes, to_device);
  if (error == cudaSuccess) error = check_side(function, "source", from, bytes, from_device);
  if (error != cudaSuccess) return error;
  *out = Operation{cudaGraphNodeTypeMemcpy};
  out->to = to;
  out->from = from;
  out->to_device = to_device;
  out->from_device = from_device;
  out->bytes = bytes;
  // Pageable memory is staged at the call. A graph reads it when it is replayed.
  if (!from_device && !capturing) {
    const auto* begin = static_cast<const char*>(from);
    out->staged = std::make_shared<std::vector<char>>(begin, begin + bytes);
  }
  return cudaSuccess;
}

cudaError_t put_copy(const char* function, void* to, const void* from, std::size_t bytes,
                     cudaMemcpyKind kind, cudaStream_t handle) {
  Stream* const stream = find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  cudaError_t error = check_stream(*stream, false);
  if (error != cudaSuccess || bytes == 0) return error;
  Operation copy{cudaGraphNodeTypeMemcpy};
  error = make_copy(function, to, from, bytes, kind, stream->capture != nullptr, &copy);
  return error == cudaSuccess ? enqueue(*stream, std::move(copy)) : error;
}

cudaError_t put_fill(const char* function, void* to, int value, std::size_t bytes,
                     cudaStream_t handle) {
  Stream* const stream = find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  cudaError_t error = check_stream(*stream, false);
  if (error != cudaSuccess || bytes == 0) return error;
  error = check_side(function, "destination", to, bytes, true);
  if (error != cudaSuccess) return error;
  Operation fill{cudaGraphNodeTypeMemset};
  fill.to = to;
  fill.value = value;
  fill.bytes = bytes;
  return enqueue(*stream, std::move(fill));
}

}  // namespace

void execute(const Operation& operation) {
  if (machine().broken != cudaSuccess) return;  // nothing runs after an error
  switch (operation.type) {
    case cudaGraphNodeTypeKernel: return execute_kernel(operation);
    case cudaGraphNodeTypeMemcpy: return execute_copy(operation);
    case cudaGraphNodeTypeMemset: return execute_fill(operation);
  }
}

cudaError_t launch(const void* kernel, Body body, dim3 grid, dim3 block, std::size_t shared,
                   cudaStream_t handle) {
  return call("cudaLaunchKernel", [&] {
    Stream* const stream = find_stream(handle);
    if (!stream || stream->device != host_thread().device) return cudaErrorInvalidResourceHandle;
    if (!is_valid(grid, block)) return cudaErrorInvalidConfiguration;
    if (shared != 0) return cudaErrorNotSupported;
    const cudaError_t error = check_stream(*stream, false);
    if (error != cudaSuccess) return error;
    Operation operation{cudaGraphNodeTypeKernel};
    operation.kernel = {kernel, std::make_shared<const Body>(std::move(body)), grid, block};
    operation.name = name_of_function(kernel);
    machine().launched.push_back(operation.name);
    return enqueue(*stream, std::move(operation));
  });
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return call("cudaMemcpyAsync",
              [=] { return put_copy("cudaMemcpyAsync", to, from, bytes, kind, stream); });
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  return call("cudaMemsetAsync",
              [=] { return put_fill("cudaMemsetAsync", to, value, bytes, stream); });
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  return call("cudaMemcpy", [=] {
    if (is_forbidden_while_capturing()) return cudaErrorStreamCaptureUnsupported;
    const cudaError_t error = put_copy("cudaMemcpy", to, from, bytes, kind, nullptr);
    if (error == cudaSuccess) run_stream(*find_stream(nullptr));
    return error == cudaSuccess ? machine().broken : error;
  });
}

cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  return call("cudaMemset", [=] {
    if (is_forbidden_while_capturing()) return cudaErrorStreamCaptureUnsupported;
    return put_fill("cudaMemset", to, value, bytes, nullptr);
  });
}
