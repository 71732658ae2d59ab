#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

/// A stand-in for the CUDA runtime, for tests: with it CUDA sources are C++17, and their kernels
/// run on the CPU. It has what this project's sources use and no more; what it does is in the files
/// beside it, and how tests direct it in emulator.h.

// --- the words of the language ----------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
/// The threads of a block run in one thread of the system, one block at a time.
#define __shared__ static thread_local

// --- types ------------------------------------------------------------------------------------

struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidMemcpyDirection = 21,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalState = 401,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureUnmatched = 903,
  cudaErrorStreamCaptureImplicit = 906,
  cudaErrorStreamCaptureWrongThread = 908,
  cudaErrorUnknown = 999
};
using cudaError_t = cudaError;

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated
};
enum cudaGraphNodeType {
  cudaGraphNodeTypeKernel,
  cudaGraphNodeTypeMemcpy,
  cudaGraphNodeTypeMemset
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106
};

/// What of it is asked for.
struct cudaDeviceProp {
  char name[256];
  std::size_t totalGlobalMem;
  int major, minor, multiProcessorCount;
};

using cudaStream_t = struct CUstream_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;
using cudaGraphNode_t = struct CUgraphNode_st*;

#define CUDART_VERSION 13000
#define cudaStreamDefault 0x00
#define cudaStreamNonBlocking 0x01
#define cudaStreamLegacy (reinterpret_cast<cudaStream_t>(0x1))
#define cudaStreamPerThread (reinterpret_cast<cudaStream_t>(0x2))

// --- host functions ---------------------------------------------------------------------------

#define EMULATOR_EXPORT __attribute__((visibility("default")))
extern "C" {
EMULATOR_EXPORT cudaError_t cudaDriverGetVersion(int* version);
EMULATOR_EXPORT cudaError_t cudaRuntimeGetVersion(int* version);
EMULATOR_EXPORT cudaError_t cudaGetDeviceCount(int* count);
EMULATOR_EXPORT cudaError_t cudaGetDevice(int* device);
EMULATOR_EXPORT cudaError_t cudaSetDevice(int device);
EMULATOR_EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute,
                                                   int device);
EMULATOR_EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
EMULATOR_EXPORT cudaError_t cudaDeviceSynchronize();

EMULATOR_EXPORT cudaError_t cudaGetLastError();
EMULATOR_EXPORT cudaError_t cudaPeekAtLastError();
EMULATOR_EXPORT const char* cudaGetErrorName(cudaError_t error);
EMULATOR_EXPORT const char* cudaGetErrorString(cudaError_t error);

EMULATOR_EXPORT cudaError_t cudaMalloc(void** out, std::size_t bytes);
EMULATOR_EXPORT cudaError_t cudaFree(void* memory);
EMULATOR_EXPORT cudaError_t cudaMemset(void* to, int value, std::size_t bytes);
EMULATOR_EXPORT cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes,
                                            cudaStream_t stream = nullptr);
EMULATOR_EXPORT cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes,
                                       cudaMemcpyKind kind);
EMULATOR_EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                                            cudaMemcpyKind kind, cudaStream_t stream = nullptr);

EMULATOR_EXPORT cudaError_t cudaStreamCreate(cudaStream_t* out);
EMULATOR_EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags);
EMULATOR_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream);
EMULATOR_EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream);

EMULATOR_EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream,
                                                  cudaStreamCaptureStatus* status);
EMULATOR_EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
EMULATOR_EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
EMULATOR_EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
EMULATOR_EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes,
                                              std::size_t* count);
EMULATOR_EXPORT cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type);
EMULATOR_EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph,
                                                 unsigned long long flags = 0);
EMULATOR_EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
EMULATOR_EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
EMULATOR_EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph);
}

namespace emulator {

/// What one thread of a kernel executes: the kernel with a copy of its arguments.
using Body = std::function<void()>;

cudaError_t launch(const void* kernel, Body body, dim3 grid, dim3 block, std::size_t shared,
                   cudaStream_t stream);
cudaError_t occupancy(int* blocks, const void* kernel, int block_size);

template <class... P, std::size_t... i>
Body bind(void (*kernel)(P...), void** arguments, std::index_sequence<i...> /*of P*/) {
  static_assert((std::is_trivially_copyable_v<P> && ...), "the arguments are copied as bytes");
  static_assert((sizeof(P) + ... + 0) <= 32764, "more than the arguments of a kernel may have");
  return [kernel, copy = std::tuple<P...>(*static_cast<const P*>(arguments[i])...)] {
    kernel(std::get<i>(copy)...);
  };
}

}  // namespace emulator

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments,
                             std::size_t shared = 0, cudaStream_t stream = nullptr) {
  return emulator::launch(reinterpret_cast<const void*>(kernel),
                          emulator::bind(kernel, arguments, std::index_sequence_for<P...>{}), grid,
                          block, shared, stream);
}

template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...),
                                                          int block_size, std::size_t /*shared*/) {
  return emulator::occupancy(blocks, reinterpret_cast<const void*>(kernel), block_size);
}

// --- device functions -------------------------------------------------------------------------

// Not C++'s thread_local, whose reads go through a function that could initialize them.
extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;
constexpr int warpSize = 32;

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);
unsigned __ballot_sync(unsigned mask, int predicate);

namespace emulator {

/// The values of the lanes of a warp after an exchange; `lane` is an offset for `by_xor`, else the
/// lane whose value is wanted.
std::uint64_t shuffle(bool by_xor, unsigned mask, std::uint64_t value, int lane, int width);

template <class T>
T shuffled(bool by_xor, unsigned mask, T value, int lane, int width) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(by_xor, mask, bits, lane, width);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  return emulator::shuffled(false, mask, value, source, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset, int width = warpSize) {
  return emulator::shuffled(true, mask, value, offset, width);
}

#if defined(EMULATOR_TSAN)
void __threadfence();
unsigned atomicAdd(unsigned* address, unsigned value);
#else
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
#endif
