// Settings, counts, ordered errors, and what the runtime tells about itself and the machine.
#include "machine.hpp"

#include <cstdio>

#include "emulator.h"

namespace emulator {

Machine& machine() {
  static auto* the = new Machine;  // for good: allocations may be freed by static destructors
  return *the;
}

HostThread& host_thread() {
  static thread_local HostThread here;
  return here;
}

cudaError_t Machine::count(const char* function) {
  ++calls[function];
  const auto order = ordered.find(function);
  if (order == ordered.end() || --order->second.calls_left > 0) return cudaSuccess;
  const cudaError_t error = order->second.error;
  ordered.erase(order);
  return error;
}

void Machine::blame(const std::string& what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what.c_str());
  if (fault.empty()) fault = what;
}

namespace {

struct Text {
  cudaError_t error;
  const char* name;
  const char* text;
};
constexpr Text texts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection",
     "invalid copy direction for memcpy"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState",
     "the operation cannot be performed in the present state"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
     "the capture was not initiated in this stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const Text* find(cudaError_t error) {
  for (const Text& text : texts)
    if (text.error == error) return &text;
  return nullptr;
}

struct Setting {
  const char* name;
  std::int64_t Settings::* member;
};
constexpr Setting names[] = {
    {"order", &Settings::order},
    {"seed", &Settings::seed},
    {"workers", &Settings::workers},
    {"streams", &Settings::streams},
    {"devices", &Settings::devices},
    {"driver_version", &Settings::driver_version},
    {"capability", &Settings::capability},
    {"multiprocessors", &Settings::multiprocessors},
    {"memory", &Settings::memory},
    {"blocks_per_multiprocessor", &Settings::blocks_per_multiprocessor},
};

std::int64_t* find(const std::string& setting) {
  for (const Setting& each : names)
    if (setting == each.name) return &(machine().settings.*each.member);
  return nullptr;
}

int attribute_of_machine(cudaDeviceAttr attribute) {
  const Settings& settings = machine().settings;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrWarpSize: return warpSize;
    case cudaDevAttrMultiProcessorCount: return static_cast<int>(settings.multiprocessors);
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return static_cast<int>(settings.capability / 10);
    case cudaDevAttrComputeCapabilityMinor: return static_cast<int>(settings.capability % 10);
    case cudaDevAttrCooperativeLaunch: return 0;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
  }
  return -1;
}

}  // namespace

cudaError_t occupancy(int* blocks, const void* /*kernel*/, int block_size) {
  return call("cudaOccupancyMaxActiveBlocksPerMultiprocessor", [=] {
    if (block_size < 1 || block_size > 1024) return cudaErrorInvalidValue;
    *blocks = static_cast<int>(machine().settings.blocks_per_multiprocessor);
    return cudaSuccess;
  });
}

}  // namespace emulator

using namespace emulator;

// --- what the runtime tells -------------------------------------------------------------------

// These two answer without driver and device.
cudaError_t cudaDriverGetVersion(int* version) {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  const cudaError_t error = machine().count("cudaDriverGetVersion");
  if (error == cudaSuccess) *version = static_cast<int>(machine().settings.driver_version);
  return error;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  const cudaError_t error = machine().count("cudaRuntimeGetVersion");
  if (error == cudaSuccess) *version = CUDART_VERSION;
  return error;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  return call("cudaGetDeviceCount", [=] {
    *count = static_cast<int>(machine().settings.devices);
    return cudaSuccess;
  });
}
cudaError_t cudaGetDevice(int* device) {
  return call("cudaGetDevice", [=] {
    *device = host_thread().device;
    return cudaSuccess;
  });
}
cudaError_t cudaSetDevice(int device) {
  return call("cudaSetDevice", [=] {
    if (device < 0 || device >= machine().settings.devices) return cudaErrorInvalidDevice;
    host_thread().device = device;
    return cudaSuccess;
  });
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return call("cudaDeviceGetAttribute", [=] {
    if (device < 0 || device >= machine().settings.devices) return cudaErrorInvalidDevice;
    *value = attribute_of_machine(attribute);
    return *value < 0 ? cudaErrorInvalidValue : cudaSuccess;
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return call("cudaGetDeviceProperties", [=] {
    const Settings& settings = machine().settings;
    if (device < 0 || device >= settings.devices) return cudaErrorInvalidDevice;
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "emulated device %d", device);
    properties->totalGlobalMem = static_cast<std::size_t>(settings.memory);
    properties->major = attribute_of_machine(cudaDevAttrComputeCapabilityMajor);
    properties->minor = attribute_of_machine(cudaDevAttrComputeCapabilityMinor);
    properties->multiProcessorCount = attribute_of_machine(cudaDevAttrMultiProcessorCount);
    return cudaSuccess;
  });
}

cudaError_t cudaGetLastError() {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  machine().count("cudaGetLastError");
  const cudaError_t error = host_thread().last_error;
  host_thread().last_error = machine().broken;
  return error;
}
cudaError_t cudaPeekAtLastError() {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  machine().count("cudaPeekAtLastError");
  return host_thread().last_error;
}
const char* cudaGetErrorName(cudaError_t error) {
  const Text* found = find(error);
  return found ? found->name : "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  const Text* found = find(error);
  return found ? found->text : "unrecognized error code";
}

// --- how tests direct it ------------------------------------------------------------------------

void emulator_reset() {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  Machine& m = machine();
  run_everything();
  forget_streams();
  m.settings = Settings{};
  m.calls.clear();
  m.ordered.clear();
  m.launched.clear();
  m.executed.clear();
  m.bytes_copied = m.bytes_set = m.kernel_errors = 0;
  m.broken = cudaSuccess;
  m.fault.clear();
  host_thread() = HostThread{};
}

int emulator_set(const char* setting, int64_t value) {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  std::int64_t* found = find(std::string(setting));
  if (found) *found = value;
  return found ? 0 : -1;
}
int64_t emulator_get(const char* setting) {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  const std::int64_t* found = find(std::string(setting));
  return found ? *found : -1;
}

void emulator_run() {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  run_everything();
}

void emulator_fail(const char* function, int64_t nth, int error) {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  machine().ordered[function] = {nth, static_cast<cudaError_t>(error)};
}

int64_t emulator_calls(const char* function) {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  const auto found = machine().calls.find(function);
  return found == machine().calls.end() ? 0 : found->second;
}

int64_t emulator_count(const char* what) {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  const std::string name = what;
  const Machine& m = machine();
  if (name == "launched") return static_cast<int64_t>(m.launched.size());
  if (name == "executed") return static_cast<int64_t>(m.executed.size());
  if (name == "bytes_copied") return m.bytes_copied;
  if (name == "bytes_set") return m.bytes_set;
  if (name == "kernel_errors") return m.kernel_errors;
  if (name == "pending") return count_pending();
  return count_memory(name);
}

namespace {
// The text stays where it is: strings of a vector would move.
const char* kept(const std::vector<std::string>& names_, int64_t index) {
  static thread_local std::string text;
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  if (index < 0 || index >= static_cast<int64_t>(names_.size())) return nullptr;
  text = names_[static_cast<std::size_t>(index)];
  return text.c_str();
}
}  // namespace

const char* emulator_launched(int64_t index) { return kept(machine().launched, index); }
const char* emulator_executed(int64_t index) { return kept(machine().executed, index); }

const char* emulator_fault() {
  static thread_local std::string text;
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  text = machine().fault;
  return text.empty() ? nullptr : text.c_str();
}
