#include <stdexcept>

#include "core/why_not.hpp"
#include "cuda/api.hpp"
#include "cuda/workspace.hpp"

namespace fusedstep::cuda {
namespace {

auto* stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

const char* status(int* devices) {
  return why_not([&] {
    *devices = 0;
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    if (driver == 0) throw std::runtime_error("there is no NVIDIA driver");
    check(cudaGetDeviceCount(devices), "cudaGetDeviceCount");
    if (*devices == 0) throw std::runtime_error("there is no NVIDIA GPU");
  });
}

// --- memory -----------------------------------------------------------------------------------

const char* allocate(int device, std::int64_t bytes, void** out) {
  return why_not([&] {
    const DeviceGuard guard(device);
    Memory memory(static_cast<std::size_t>(bytes));
    memory.clear();
    *out = memory.release();
  });
}

void release(int device, void* memory) {
  why_not([&] {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    check(cudaFree(memory), "cudaFree");
  });
}

void copy(int device, void* stream, void* to, const void* from, std::int64_t bytes,
          cudaMemcpyKind kind) {
  const DeviceGuard guard(device);
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, stream_of(stream)),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream_of(stream)), "cudaStreamSynchronize");
}

const char* copy_in(int device, void* stream, void* to, const void* from, std::int64_t bytes) {
  return why_not([&] { copy(device, stream, to, from, bytes, cudaMemcpyHostToDevice); });
}

const char* copy_out(int device, void* stream, void* to, const void* from, std::int64_t bytes) {
  return why_not([&] { copy(device, stream, to, from, bytes, cudaMemcpyDeviceToHost); });
}

const char* synchronize(int device) {
  return why_not([&] {
    const DeviceGuard guard(device);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  });
}

const char* capturing(int device, void* stream, bool* out) {
  return why_not([&] {
    const DeviceGuard guard(device);
    *out = is_capturing(stream_of(stream));
  });
}

// --- steps ------------------------------------------------------------------------------------

const char* make_workspace(int device, void** out) {
  return why_not([&] { *out = new Workspace(device); });
}

void free_workspace(void* workspace) { delete static_cast<Workspace*>(workspace); }

const char* step(void* workspace, const DeviceCall* call, void** report) {
  return why_not([&] { *report = static_cast<Workspace*>(workspace)->step(*call).release(); });
}

const char* read_report(void* report, void* stream, DeviceReport* out, double* tensor_norms) {
  return why_not(
      [&] { static_cast<const Report*>(report)->read(stream_of(stream), *out, tensor_norms); });
}

void free_report(void* report) { delete static_cast<Report*>(report); }

DeviceApi table() {
  DeviceApi api{};
  api.status = status;
  api.allocate = allocate;
  api.release = release;
  api.copy_in = copy_in;
  api.copy_out = copy_out;
  api.synchronize = synchronize;
  api.is_capturing = capturing;
  api.make_workspace = make_workspace;
  api.free_workspace = free_workspace;
  api.step = step;
  api.read_report = read_report;
  api.free_report = free_report;
  return api;
}

}  // namespace

const DeviceApi& device_api() {
  static const DeviceApi api = table();
  return api;
}

}  // namespace fusedstep::cuda
