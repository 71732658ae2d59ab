#pragma once
#include <cuda_runtime.h>

/// Small kernels, right and wrong ones, to check the emulator with.
namespace toys {

constexpr unsigned threads = 128, warps = threads / 32, all_lanes = 0xffffffffu;

struct Sum {
  const double* in;
  double* partial;  ///< [blocks]
  double* out;
  unsigned* ticket;
  unsigned count;
};

/// The sum over a block; all threads get it. `barriers`: as it has to be.
template <bool barriers>
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double of_warps[warps];
  for (int offset = 16; offset >= 1; offset /= 2) x += __shfl_xor_sync(all_lanes, x, offset);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  if constexpr (barriers) __syncthreads();
  double sum = 0.0;
  for (unsigned w = 0; w < warps; ++w) sum += of_warps[w];
  if constexpr (barriers) __syncthreads();
  return sum;
}

enum class Fence { right, none, before_barrier };

/// Sums up in one launch: the block that is last adds the sums of all.
template <bool barriers, Fence fence>
__global__ void __launch_bounds__(threads) sum_up(const __grid_constant__ Sum a) {
  __shared__ bool last;
  double x = 0.0;
  for (unsigned i = blockIdx.x * threads + threadIdx.x; i < a.count; i += gridDim.x * threads)
    x += a.in[i];
  const double sum = block_sum<barriers>(x);
  // Not thread 0, so that what it wrote has to go through a barrier and a fence.
  if (threadIdx.x == 77) a.partial[blockIdx.x] = sum;
  if constexpr (fence == Fence::before_barrier) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (fence == Fence::right) __threadfence();
    last = atomicAdd(a.ticket, 1u) == gridDim.x - 1;
    if constexpr (fence != Fence::none) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  x = 0.0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += threads) x += a.partial[i];
  const double total = block_sum<true>(x);
  if (threadIdx.x == 5) {
    *a.out = total;
    *a.ticket = 0;
  }
}

struct Numbers {
  unsigned* out;
  unsigned value;
};

/// Every thread writes who it is.
inline __global__ void identify(Numbers a) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  a.out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = a.value + thread;
}

/// All exchanges of a warp: 5 numbers for each thread.
inline __global__ void exchange(Numbers a) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  unsigned* const out = a.out + std::size_t{5} * threadIdx.x;
  out[0] = __shfl_sync(all_lanes, threadIdx.x, lane + 1);
  out[1] = __shfl_xor_sync(all_lanes, threadIdx.x, 5);
  out[2] = __shfl_xor_sync(all_lanes, threadIdx.x, 3, 8);
  out[3] = __shfl_sync(all_lanes, threadIdx.x, 2, 4);
  out[4] = __ballot_sync(all_lanes, threadIdx.x % 3 == 0);
}

/// Every thread reads what its neighbour wrote into shared memory, again and again.
inline __global__ void rotate(Numbers a) {
  __shared__ unsigned ring[threads];
  unsigned x = threadIdx.x;
  for (unsigned i = 0; i < a.value; ++i) {
    ring[threadIdx.x] = x;
    __syncthreads();
    x = ring[(threadIdx.x + 1) % threads];
    __syncthreads();
  }
  a.out[threadIdx.x] = x;
}

/// The same within warps.
inline __global__ void rotate_in_warps(Numbers a) {
  __shared__ unsigned ring[threads];
  unsigned x = threadIdx.x;
  for (unsigned i = 0; i < a.value; ++i) {
    ring[threadIdx.x] = x;
    __syncwarp();
    x = ring[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
    __syncwarp();
  }
  a.out[threadIdx.x] = x;
}

inline __global__ void add(Numbers a) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.out += a.value;
}
inline __global__ void multiply(Numbers a) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.out *= a.value;
}

// --- wrong ones -------------------------------------------------------------------------------

/// What is in shared memory at the beginning.
inline __global__ void read_uninitialized(Numbers a) {
  __shared__ unsigned never_written[threads];
  a.out[threadIdx.x] = never_written[threadIdx.x];
}
/// Depends on the order of threads.
inline __global__ void race(Numbers a) { *a.out = threadIdx.x; }
/// Depends on the order of blocks.
inline __global__ void race_of_blocks(Numbers a) {
  if (threadIdx.x == 0) *a.out = blockIdx.x;
}
inline __global__ void leave_before_barrier(Numbers a) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  a.out[threadIdx.x] = 1;
}
inline __global__ void leave_before_shuffle(Numbers a) {
  if (threadIdx.x == 40) return;
  a.out[threadIdx.x] = __shfl_xor_sync(all_lanes, threadIdx.x, 1);
}
inline __global__ void part_of_warp(Numbers a) {
  if (threadIdx.x % 2 == 0) a.out[threadIdx.x] = __ballot_sync(all_lanes, 1);
  __syncthreads();
}
inline __global__ void two_operations(Numbers a) {
  a.out[threadIdx.x] = threadIdx.x % 2 == 0 ? __ballot_sync(all_lanes, 1)
                                            : __shfl_xor_sync(all_lanes, threadIdx.x, 1);
}
inline __global__ void misaligned(Numbers a) {
  reinterpret_cast<uint4*>(a.out + 1)[threadIdx.x] = make_uint4(1, 2, 3, 4);
}
inline __global__ void beyond(Numbers a) { a.out[threadIdx.x + a.value] = 1; }

}  // namespace toys
