// Checks of the host side of the emulator: streams, graphs, memory, ordered errors.

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "emulator.h"
#include "toys.hpp"

namespace {

using toys::Numbers;
void (*check)(bool, const std::string&) = nullptr;

void expect(cudaError_t got, cudaError_t want, const std::string& what) {
  check(got == want, what + ": " + cudaGetErrorName(got));
}
void succeed(cudaError_t error, const std::string& what) { expect(error, cudaSuccess, what); }

/// One number in device memory.
struct Number {
  unsigned* at = nullptr;
  Number() {
    succeed(cudaMalloc(reinterpret_cast<void**>(&at), sizeof *at), "cudaMalloc");
    *at = 1;  // behind the runtime's back: it is the host's memory after all
  }
  ~Number() { succeed(cudaFree(at), "cudaFree"); }
  Number(const Number&) = delete;
  Number& operator=(const Number&) = delete;
};

struct NewStream {
  cudaStream_t handle = nullptr;
  explicit NewStream(unsigned flags = cudaStreamNonBlocking) {
    succeed(cudaStreamCreateWithFlags(&handle, flags), "cudaStreamCreateWithFlags");
  }
  ~NewStream() { succeed(cudaStreamDestroy(handle), "cudaStreamDestroy"); }
  NewStream(const NewStream&) = delete;
  NewStream& operator=(const NewStream&) = delete;
};

cudaError_t put(void (*kernel)(Numbers), const Number& number, unsigned value,
                cudaStream_t stream) {
  Numbers argument{number.at, value};
  void* arguments[] = {&argument};
  return cudaLaunchKernel(kernel, dim3(2), dim3(32), arguments, 0, stream);
}
void do_put(void (*kernel)(Numbers), const Number& number, unsigned value, cudaStream_t stream) {
  succeed(put(kernel, number, value, stream), "cudaLaunchKernel");
}

void check_deferred() {
  const Number number;
  const NewStream a, b;
  do_put(toys::add, number, 2, a.handle);
  do_put(toys::multiply, number, 5, a.handle);
  check(*number.at == 1 && emulator_count("pending") == 2, "nothing has run");
  succeed(cudaStreamSynchronize(b.handle), "another stream");
  check(*number.at == 1, "another stream was waited for");
  succeed(cudaStreamSynchronize(a.handle), "cudaStreamSynchronize");
  check(*number.at == 15, "in the order of the stream");

  emulator_set("streams", 1);
  do_put(toys::add, number, 1, a.handle);
  check(*number.at == 16, "at once");
  emulator_reset();
}

void check_unordered_streams() {
  const Number number;
  const NewStream a, b;
  const auto result = [&](int order) {
    emulator_set("order", order);
    *number.at = 1;
    do_put(toys::add, number, 2, a.handle);
    do_put(toys::multiply, number, 5, b.handle);
    emulator_run();
    return *number.at;
  };
  check(result(0) == 15 && result(1) == 7, "two streams in both orders");
  bool seen[2] = {};
  for (int i = 0; i < 50; ++i) seen[result(2) == 7] = true;
  check(seen[0] && seen[1], "two streams in random order");
  emulator_reset();
}

/// The legacy stream waits for blocking streams, and they for it.
void check_legacy_stream() {
  const Number number;
  const NewStream blocking(cudaStreamDefault), free;
  do_put(toys::add, number, 2, blocking.handle);
  do_put(toys::multiply, number, 5, nullptr);
  do_put(toys::add, number, 1, cudaStreamPerThread);
  do_put(toys::add, number, 100, free.handle);
  succeed(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize");
  check(*number.at == 16, "blocking, legacy, per thread");
  do_put(toys::multiply, number, 2, cudaStreamLegacy);
  succeed(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  check(*number.at == 32, "the null stream is the legacy one");
  succeed(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  check(*number.at == 132, "not blocking");
}

void check_copies() {
  const Number number;
  const NewStream stream;
  unsigned value = 3, out = 0;
  const std::size_t size = sizeof value;
  succeed(cudaMemcpyAsync(number.at, &value, size, cudaMemcpyHostToDevice, stream.handle), "copy");
  value = 4;
  do_put(toys::add, number, 10, stream.handle);
  succeed(cudaMemcpyAsync(&out, number.at, size, cudaMemcpyDefault, stream.handle), "copy back");
  check(*number.at == 1 && out == 0, "nothing has run");
  succeed(cudaStreamSynchronize(stream.handle), "cudaStreamSynchronize");
  check(out == 13, "what the host held at the call was copied");
  check(emulator_count("bytes_copied") == 2 * sizeof value, "bytes_copied");
  succeed(cudaMemsetAsync(number.at, 0x11, size, stream.handle), "fill");
  succeed(cudaStreamSynchronize(stream.handle), "cudaStreamSynchronize");
  check(*number.at == 0x11111111u && emulator_count("bytes_set") == size, "fill");

  const cudaError_t wrong = cudaErrorInvalidValue;
  expect(cudaMemcpyAsync(&value, &out, size, cudaMemcpyHostToDevice, stream.handle), wrong,
         "copy to no device");
  check(emulator_fault() && std::strstr(emulator_fault(), "destination"), "fault of a copy");
  emulator_register(&value, sizeof value, 0);
  succeed(cudaMemcpyAsync(&value, &out, size, cudaMemcpyHostToDevice, stream.handle), "registered");
  expect(cudaMemcpyAsync(&out, number.at, 2 * size, cudaMemcpyDeviceToHost, stream.handle), wrong,
         "copy beyond an allocation");
  expect(cudaMemcpyAsync(&value, &out, size, cudaMemcpyDeviceToHost, stream.handle), wrong,
         "copy to memory of a device as to the host");
  succeed(cudaStreamSynchronize(stream.handle), "cudaStreamSynchronize");
  emulator_unregister(&value);
  expect(cudaMemsetAsync(&value, 0, size, stream.handle), wrong, "fill of no device");
  emulator_reset();
}

void check_memory() {
  void* memory = nullptr;
  succeed(cudaMalloc(&memory, 100), "cudaMalloc");
  auto* const bytes = static_cast<unsigned char*>(memory);
  check(reinterpret_cast<std::uintptr_t>(memory) % 256 == 0, "aligned");
  check(bytes[0] == 0xcd && bytes[99] == 0xcd, "not zero");
  check(emulator_count("allocations") == 1 && emulator_count("allocated_bytes") == 100, "counted");
  check(emulator_count("broken_guards") == 0, "guards");
#if !defined(EMULATOR_ASAN)
  bytes[100] = 1;
  check(emulator_count("broken_guards") == 1, "a guard is broken");
  succeed(cudaFree(memory), "cudaFree");
  check(emulator_fault() && std::strstr(emulator_fault(), "beyond"), "fault of a guard");
#else
  succeed(cudaFree(memory), "cudaFree");
#endif
  expect(cudaFree(&memory), cudaErrorInvalidValue, "cudaFree of what is none");
  expect(cudaMalloc(&memory, std::size_t{1} << 62), cudaErrorMemoryAllocation, "too much");
  succeed(cudaFree(nullptr), "cudaFree of nothing");
  emulator_reset();
}

// --- graphs -----------------------------------------------------------------------------------

void check_replays() {
  const Number number;
  const NewStream stream;
  succeed(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeGlobal), "begin");
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  succeed(cudaStreamIsCapturing(stream.handle, &status), "cudaStreamIsCapturing");
  check(status == cudaStreamCaptureStatusActive, "is capturing");
  do_put(toys::add, number, 1, stream.handle);
  do_put(toys::multiply, number, 2, stream.handle);
  cudaGraph_t graph = nullptr;
  succeed(cudaStreamEndCapture(stream.handle, &graph), "end");
  emulator_run();
  check(*number.at == 1, "captured, not run");
  std::size_t count = 0;
  succeed(cudaGraphGetNodes(graph, nullptr, &count), "cudaGraphGetNodes");
  check(count == 2, "two nodes");
  cudaGraphNode_t nodes[2];
  succeed(cudaGraphGetNodes(graph, nodes, &count), "cudaGraphGetNodes");
  cudaGraphNodeType type = cudaGraphNodeTypeMemset;
  succeed(cudaGraphNodeGetType(nodes[1], &type), "cudaGraphNodeGetType");
  check(type == cudaGraphNodeTypeKernel, "a kernel");
  cudaGraphExec_t exec = nullptr;
  succeed(cudaGraphInstantiate(&exec, graph), "cudaGraphInstantiate");
  succeed(cudaGraphDestroy(graph), "cudaGraphDestroy");
  for (int i = 0; i < 3; ++i) succeed(cudaGraphLaunch(exec, stream.handle), "cudaGraphLaunch");
  check(*number.at == 1, "launched, not run");
  succeed(cudaStreamSynchronize(stream.handle), "cudaStreamSynchronize");
  check(*number.at == 22, "replayed three times");
  check(emulator_count("launched") == 2 && emulator_count("executed") == 6, "counts");
  check(emulator_executed(1) == std::string("toys::multiply(toys::Numbers)"), "name");
  check(emulator_executed(6) == nullptr, "no more names");
  succeed(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
  expect(cudaGraphLaunch(exec, stream.handle), cudaErrorInvalidValue, "a graph that is gone");
  emulator_reset();
}

/// What a capture must not see ends it.
void check_captures_end() {
  const Number number;
  const NewStream stream, blocking(cudaStreamDefault);
  void* memory = nullptr;
  cudaGraph_t graph = nullptr;
  const auto begin = [&](cudaStream_t at, cudaStreamCaptureMode mode) {
    succeed(cudaStreamBeginCapture(at, mode), "begin");
  };
  const auto ended = [&](cudaStream_t at, const std::string& what) {
    expect(put(toys::add, number, 1, at), cudaErrorStreamCaptureInvalidated, what);
    expect(cudaStreamEndCapture(at, &graph), cudaErrorStreamCaptureInvalidated, what);
    check(!graph, what);
  };
  const auto unsupported = cudaErrorStreamCaptureUnsupported;
  begin(stream.handle, cudaStreamCaptureModeGlobal);
  expect(cudaMalloc(&memory, 8), unsupported, "cudaMalloc");
  ended(stream.handle, "by cudaMalloc");
  begin(stream.handle, cudaStreamCaptureModeThreadLocal);
  expect(cudaMemset(number.at, 0, 4), unsupported, "cudaMemset");
  ended(stream.handle, "by cudaMemset");
  begin(stream.handle, cudaStreamCaptureModeRelaxed);
  succeed(cudaMalloc(&memory, 8), "cudaMalloc in a relaxed capture");
  succeed(cudaFree(memory), "cudaFree in a relaxed capture");
  expect(cudaStreamSynchronize(stream.handle), unsupported, "cudaStreamSynchronize");
  ended(stream.handle, "by cudaStreamSynchronize");
  begin(blocking.handle, cudaStreamCaptureModeRelaxed);
  cudaStreamCaptureStatus status{};
  expect(cudaStreamIsCapturing(nullptr, &status), cudaErrorStreamCaptureImplicit, "legacy asked");
  expect(put(toys::add, number, 1, nullptr), cudaErrorStreamCaptureImplicit, "legacy used");
  ended(blocking.handle, "by the legacy stream");
  expect(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal), unsupported, "legacy");
  expect(cudaStreamEndCapture(stream.handle, &graph), cudaErrorIllegalState, "no capture");
  emulator_run();
  check(*number.at == 1, "nothing of this has run");
}

void check_relaxed_threads() {
  const NewStream stream;
  void* memory = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  succeed(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeGlobal), "begin");
  succeed(cudaThreadExchangeStreamCaptureMode(&mode), "exchange");
  check(mode == cudaStreamCaptureModeGlobal, "the mode before");
  succeed(cudaMalloc(&memory, 8), "cudaMalloc of a relaxed thread");
  succeed(cudaMemsetAsync(memory, 7, 8, cudaStreamPerThread), "another stream is not captured");
  succeed(cudaStreamSynchronize(cudaStreamPerThread), "nor is waiting for it");
  succeed(cudaFree(memory), "cudaFree");
  succeed(cudaThreadExchangeStreamCaptureMode(&mode), "exchange back");
  check(mode == cudaStreamCaptureModeRelaxed, "the relaxed mode");
  cudaError_t other = cudaSuccess;
  std::thread([&] { other = cudaMalloc(&memory, 8); }).join();
  expect(other, cudaErrorStreamCaptureUnsupported, "cudaMalloc in another thread");
  cudaGraph_t graph = nullptr;
  expect(cudaStreamEndCapture(stream.handle, &graph), cudaErrorStreamCaptureInvalidated, "end");
}

// --- the machine ------------------------------------------------------------------------------

void check_ordered_errors() {
  emulator_reset();
  const Number number;
  emulator_fail("cudaLaunchKernel", 2, cudaErrorLaunchOutOfResources);
  do_put(toys::add, number, 1, nullptr);
  expect(put(toys::add, number, 1, nullptr), cudaErrorLaunchOutOfResources, "the second launch");
  expect(cudaPeekAtLastError(), cudaErrorLaunchOutOfResources, "peek");
  expect(cudaGetLastError(), cudaErrorLaunchOutOfResources, "the last error");
  expect(cudaGetLastError(), cudaSuccess, "forgotten");
  do_put(toys::add, number, 1, nullptr);
  succeed(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  check(*number.at == 3 && emulator_calls("cudaLaunchKernel") == 3, "two of three");

  emulator_fail("kernel", 1, cudaErrorIllegalAddress);
  do_put(toys::add, number, 1, nullptr);
  expect(cudaStreamSynchronize(nullptr), cudaErrorIllegalAddress, "found when waited for");
  expect(put(toys::add, number, 1, nullptr), cudaErrorIllegalAddress, "and ever after");
  expect(cudaGetLastError(), cudaErrorIllegalAddress, "the last error");
  expect(cudaGetLastError(), cudaErrorIllegalAddress, "is not forgotten");
  emulator_reset();
  check(*number.at == 3, "nothing runs after an error");
}

void check_machine() {
  int value = 0;
  emulator_set("devices", 2);
  succeed(cudaGetDeviceCount(&value), "cudaGetDeviceCount");
  check(value == 2, "two devices");
  succeed(cudaSetDevice(1), "cudaSetDevice");
  expect(cudaSetDevice(2), cudaErrorInvalidDevice, "cudaSetDevice(2)");
  {
    const Number number;
    NewStream stream;
    do_put(toys::add, number, 1, stream.handle);
    succeed(cudaSetDevice(0), "cudaSetDevice");
    expect(put(toys::add, number, 1, stream.handle), cudaErrorInvalidResourceHandle,
           "a stream of another device");
    do_put(toys::add, number, 10, nullptr);
    succeed(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
    check(*number.at == 11, "every device has a null stream");
    emulator_run();
    check(*number.at == 12, "everything");
  }
  emulator_set("capability", 75);
  succeed(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 1), "attribute");
  check(value == 7, "major");
  cudaDeviceProp properties;
  succeed(cudaGetDeviceProperties(&properties, 1), "cudaGetDeviceProperties");
  check(properties.name == std::string("emulated device 1") && properties.minor == 5, "properties");
  emulator_set("multiprocessors", 132);
  succeed(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0), "attribute");
  check(value == 132 && emulator_get("multiprocessors") == 132, "multiprocessors");
  succeed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, toys::add, 128, 0), "occupancy");
  check(value == 2, "occupancy");
  emulator_set("devices", 0);
  expect(cudaGetDeviceCount(&value), cudaErrorNoDevice, "no device");
  emulator_set("driver_version", 0);
  expect(cudaGetDeviceCount(&value), cudaErrorInsufficientDriver, "no driver");
  succeed(cudaDriverGetVersion(&value), "cudaDriverGetVersion");
  check(value == 0, "no driver");
  succeed(cudaRuntimeGetVersion(&value), "cudaRuntimeGetVersion");
  check(value == CUDART_VERSION, "the runtime is there");
  check(emulator_set("colour", 1) == -1 && emulator_count("colours") == -1, "no such setting");
  emulator_reset();
  const Number number;
  const auto refused = [&](dim3 grid, dim3 block) {
    Numbers argument{number.at, 1};
    void* arguments[] = {&argument};
    expect(cudaLaunchKernel(toys::add, grid, block, arguments, 0, nullptr),
           cudaErrorInvalidConfiguration, "a launch that no GPU takes");
  };
  refused(0, 32);
  refused(1, 0);
  refused(1, 1025);
  refused(dim3(1, 65536), 32);
}

}  // namespace

void check_runtime(void (*check_)(bool, const std::string&)) {
  check = check_;
  check_deferred();
  check_unordered_streams();
  check_legacy_stream();
  check_copies();
  check_memory();
  check_replays();
  check_captures_end();
  check_relaxed_threads();
  check_ordered_errors();
  check_machine();
}
