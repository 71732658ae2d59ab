// Streams: what is put into them runs when something waits for it, as late as on a GPU that is far
// behind.
#include "streams.hpp"

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {

struct Streams {
  std::vector<std::unique_ptr<Stream>> made;
  std::map<int, Stream*> legacy;
  std::map<std::pair<int, std::thread::id>, Stream*> of_threads;
  std::uint64_t operations = 0, random = 1;
};

Streams& streams() {
  static auto* all = new Streams;
  return *all;
}

Stream* make(int device, bool blocking, bool legacy) {
  streams().made.push_back(std::make_unique<Stream>(Stream{device, blocking, legacy}));
  return streams().made.back().get();
}

cudaStream_t handle_of(Stream* stream) { return reinterpret_cast<cudaStream_t>(stream); }

// --- running ------------------------------------------------------------------------------------

void run_next(Stream& stream) {
  const std::uint64_t number = stream.queue.front().number;
  if (stream.blocking) {
    for (Stream* other : all_streams()) {
      const bool before = other != &stream && other->device == stream.device && other->blocking &&
                          (stream.legacy || other->legacy);
      while (before && !other->queue.empty() && other->queue.front().number < number)
        run_next(*other);
    }
  }
  const Operation operation = std::move(stream.queue.front());
  stream.queue.pop_front();
  execute(operation);
}

Stream* pick(std::vector<Stream*> all) {
  const auto idle = [](const Stream* stream) { return stream->queue.empty(); };
  all.erase(std::remove_if(all.begin(), all.end(), idle), all.end());
  if (all.empty()) return nullptr;
  switch (machine().settings.order) {
    case 0: return all.front();
    case 1: return all.back();
    default: return all[random_below(streams().random, all.size())];
  }
}

/// Something of what is waiting, or nothing.
void run_some() {
  while (random_below(streams().random, 2) == 0) {
    std::vector<Stream*> all = all_streams();
    Stream* const any = all[random_below(streams().random, all.size())];
    if (!any->queue.empty()) run_next(*any);
  }
}

/// A blocking stream that captures would have to wait for the legacy stream, and that for it.
cudaError_t check_legacy(const Stream& stream) {
  cudaError_t error = cudaSuccess;
  for (Stream* other : all_streams()) {
    if (!stream.legacy || !other->capture || !other->blocking || other->device != stream.device)
      continue;
    other->capture->valid = false;
    error = cudaErrorStreamCaptureImplicit;
  }
  return error;
}

}  // namespace

std::vector<Stream*> all_streams() {
  std::vector<Stream*> all;
  for (const auto& stream : streams().made) all.push_back(stream.get());
  return all;
}

Stream* find_stream(cudaStream_t handle) {
  const int device = host_thread().device;
  if (!handle || handle == cudaStreamLegacy) {
    Stream*& found = streams().legacy[device];
    return found ? found : found = make(device, true, true);
  }
  if (handle == cudaStreamPerThread) {
    Stream*& found = streams().of_threads[{device, std::this_thread::get_id()}];
    return found ? found : found = make(device, true, false);
  }
  for (Stream* stream : all_streams())
    if (handle_of(stream) == handle) return stream;
  return nullptr;
}

cudaError_t check_stream(Stream& stream, bool waiting) {
  if (stream.capture && waiting) {
    stream.capture->valid = false;
    return cudaErrorStreamCaptureUnsupported;
  }
  if (stream.capture && !stream.capture->valid) return cudaErrorStreamCaptureInvalidated;
  return check_legacy(stream);
}

cudaError_t enqueue(Stream& stream, Operation operation) {
  if (stream.capture) {
    stream.capture->operations.push_back(std::move(operation));
    return cudaSuccess;
  }
  operation.number = ++streams().operations;
  stream.queue.push_back(std::move(operation));
  if (machine().settings.streams == 1) run_stream(stream);
  if (machine().settings.streams == 2) run_some();
  return cudaSuccess;
}

void run_stream(Stream& stream) {
  while (!stream.queue.empty()) run_next(stream);
}

void run_everything() {
  streams().random += static_cast<std::uint64_t>(machine().settings.seed);
  while (Stream* const next = pick(all_streams()))
    machine().settings.order == 2 ? run_next(*next) : run_stream(*next);
}

std::int64_t count_pending() {
  std::size_t count = 0;
  for (const Stream* stream : all_streams()) count += stream->queue.size();
  return static_cast<std::int64_t>(count);
}

bool is_forbidden_while_capturing() {
  bool forbidden = false;
  const cudaStreamCaptureMode mode = host_thread().mode;
  for (Stream* stream : all_streams()) {
    Capture* const capture = stream->capture.get();
    if (!capture || mode == cudaStreamCaptureModeRelaxed) continue;
    const bool mine = capture->thread == std::this_thread::get_id() &&
                      capture->mode != cudaStreamCaptureModeRelaxed;
    const bool global =
        capture->mode == cudaStreamCaptureModeGlobal && mode == cudaStreamCaptureModeGlobal;
    if (!mine && !global) continue;
    capture->valid = false;
    forbidden = true;
  }
  return forbidden;
}

void forget_streams() {
  streams().random = 1;
  for (Stream* stream : all_streams()) stream->capture.reset();
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return call("cudaStreamCreateWithFlags", [=] {
    if (flags > cudaStreamNonBlocking) return cudaErrorInvalidValue;
    *out = handle_of(make(host_thread().device, flags == cudaStreamDefault, false));
    return cudaSuccess;
  });
}

cudaError_t cudaStreamCreate(cudaStream_t* out) {
  return call("cudaStreamCreate", [=] {
    *out = handle_of(make(host_thread().device, true, false));
    return cudaSuccess;
  });
}

// What is in the stream is still run; drivers do that later, when they give the stream back.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  return call("cudaStreamDestroy", [=] {
    auto& made = streams().made;
    const auto found = std::find_if(made.begin(), made.end(), [=](const auto& stream) {
      return handle_of(stream.get()) == handle;
    });
    if (found == made.end()) return cudaErrorInvalidResourceHandle;
    if ((*found)->capture) return cudaErrorStreamCaptureUnsupported;
    run_stream(**found);
    made.erase(found);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return call("cudaStreamSynchronize", [=] {
    Stream* const stream = find_stream(handle);
    if (!stream) return cudaErrorInvalidResourceHandle;
    const cudaError_t error = check_stream(*stream, true);
    if (error != cudaSuccess) return error;
    if (machine().settings.streams == 2) run_some();
    run_stream(*stream);
    return machine().broken;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return call("cudaDeviceSynchronize", [] {
    for (Stream* stream : all_streams())
      if (stream->capture) return check_stream(*stream, true);
    run_everything();
    return machine().broken;
  });
}
