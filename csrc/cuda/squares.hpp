#pragma once
#include "core/norm_tree.hpp"
#include "cuda/elements.hpp"

/// The fixed tree of the norm (core/norm_tree.hpp) by a block of threads.
///
/// Sums of squares are no longer -0, and a + 0 is a: what is missing is skipped. A butterfly of
/// shuffles adds the same pairs as a fold by halving, only that every lane gets the result.
namespace fusedstep::cuda {

constexpr unsigned all_lanes = 0xffffffffu;

/// Folds the lanes `width` / 2, ..., `least` apart.
template <int width, int least = 1>
__device__ __forceinline__ double fold_lanes(double x) {
#pragma unroll
  for (int half = width / 2; half >= least; half /= 2) x += __shfl_xor_sync(all_lanes, x, half);
  return x;
}

/// The gradient of a chunk.
struct GradChunk {
  const void* data;            ///< of the whole tensor if it is to be gathered, else of the chunk
  const LayoutRecord* layout;  ///< or null
  std::int64_t begin;          ///< of the chunk
  DType dtype;                 ///< as it is summed
  int count;
};

__device__ __forceinline__ double element(const GradChunk& grad, int i) {
  if (grad.dtype == DType::float64) {
    return grad.layout ? gather_one<double>(grad.data, *grad.layout, grad.begin + i)
                       : in_buffer(static_cast<const double*>(grad.data))[i];
  }
  return static_cast<double>(grad.layout
                                 ? gather_one<float>(grad.data, *grad.layout, grad.begin + i)
                                 : load_float(grad.data, grad.dtype, i));
}

/// Folds the tile sums, which the threads have put into shared memory; all threads get the sum.
__device__ __forceinline__ double fold_tiles(const double* tile_sums) {
  __syncthreads();
  const double mine = tile_sums[threadIdx.x % norm_tree::tiles];
  const double sum = fold_lanes<norm_tree::tiles>(mine);
  __syncthreads();  // they may be overwritten now
  return sum;
}

// --- any gradient, slowly ---------------------------------------------------------------------

/// A warp per tile, a lane per lane. For gradients that are gathered, and for a second look, where
/// `scale` is not 1.
__device__ __forceinline__ double sum_by_elements(const GradChunk& grad, double scale) {
  __shared__ double tile_sums[norm_tree::tiles];
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  for (int tile = static_cast<int>(threadIdx.x) / warp_size; tile < norm_tree::tiles;
       tile += warps) {
    double sum = 0.0;
    for (int row = 0; row < norm_tree::rows; ++row) {
      const int i = tile * norm_tree::tile_size + row * norm_tree::lanes + lane;
      if (i >= grad.count) break;
      const double x = element(grad, i) * scale;
      sum += x * x;
    }
    sum = fold_lanes<norm_tree::lanes>(sum);
    if (lane == 0) tile_sums[tile] = sum;
  }
  return fold_tiles(tile_sums);
}

// --- dense gradients --------------------------------------------------------------------------
// A tile belongs to a group of neighbouring threads, each of which reads 16 bytes of every row. If
// the address is not a multiple of 16, they read the words that are: lanes are then the same
// rotated by `shift`, which no fold sees, but the first thread's first elements belong to the row
// before, so that it has one word more than there are rows.

template <class T>
constexpr int word_size = static_cast<int>(sizeof(uint4) / sizeof(T));

/// sum + x^2. The square of anything but a float64 is exact in float64, so there a fused operation
/// gives the same bits.
template <class T>
__device__ __forceinline__ double add_square(double sum, T x) {
  const double wide = static_cast<double>(widened(x));
  if constexpr (sizeof(T) < sizeof(double)) return fma(wide, wide, sum);
  return sum + wide * wide;
}

template <class T>
__device__ __forceinline__ void add_squares(double* sums, const uint4& words) {
  T x[word_size<T>];
  memcpy(x, &words, sizeof words);
#pragma unroll
  for (int k = 0; k < word_size<T>; ++k) sums[k] = add_square(sums[k], x[k]);
}

/// Of a word that is partly outside of the tile.
template <class T>
__device__ __forceinline__ void add_inner_squares(double* sums, const T* tile, int first,
                                                  int count) {
#pragma unroll
  for (int k = 0; k < word_size<T>; ++k)
    if (first + k >= 0 && first + k < count) sums[k] = add_square(sums[k], tile[first + k]);
}

/// Words that a thread asks for before it uses the first: many where memory is far, few where the
/// registers are worth more.
constexpr int far_ahead = 8, little_ahead = 2;

/// The sum over `count` > 0 elements of a tile, for the thread `member` of a group.
template <int ahead, class T>
__device__ __forceinline__ double sum_tile(const T* tile, int count, int member) {
  constexpr int n = word_size<T>;
  const auto address = reinterpret_cast<std::uintptr_t>(tile);
  const int shift = static_cast<int>(address % sizeof(uint4) / sizeof(T));
  int first = member * n - shift;  // of this thread's word in the row at hand
  double sums[n] = {};
  if (first < 0) {
    add_inner_squares(sums, tile, first, count);
    first += norm_tree::lanes;
  }
#pragma unroll 1
  for (; first + (ahead - 1) * norm_tree::lanes + n <= count; first += ahead * norm_tree::lanes) {
    uint4 words[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k)
      words[k] = *reinterpret_cast<const uint4*>(tile + first + k * norm_tree::lanes);
#pragma unroll
    for (int k = 0; k < ahead; ++k) add_squares<T>(sums, words[k]);
  }
#pragma unroll 1
  for (; first + n <= count; first += norm_tree::lanes) {
    const uint4 words = *reinterpret_cast<const uint4*>(tile + first);
    add_squares<T>(sums, words);
  }
  add_inner_squares(sums, tile, first, count);
#pragma unroll
  for (int k = 0; k < n; ++k) sums[k] = fold_lanes<norm_tree::lanes / n>(sums[k]);
#pragma unroll
  for (int half = n / 2; half >= 1; half /= 2)
#pragma unroll
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0];
}

template <class T, int ahead>
__device__ __forceinline__ double sum_dense(const GradChunk& grad) {
  constexpr int group = norm_tree::lanes / word_size<T>;
  __shared__ double tile_sums[norm_tree::tiles];
  const T* const data = in_buffer(static_cast<const T*>(grad.data));
  const int member = static_cast<int>(threadIdx.x) % group;
  for (int tile = static_cast<int>(threadIdx.x) / group; tile < norm_tree::tiles;
       tile += threads / group) {
    const int begin = tile * norm_tree::tile_size, left = grad.count - begin;
    const int count = left < norm_tree::tile_size ? left : norm_tree::tile_size;
    const double sum = sum_tile<ahead>(data + begin, count, member);
    if (member == 0) tile_sums[tile] = sum;
  }
  return fold_tiles(tile_sums);
}

/// The chunk sum, for all threads of the block.
template <int ahead>
__device__ __forceinline__ double sum_chunk(const GradChunk& grad) {
  if (grad.layout) return sum_by_elements(grad, 1.0);
  switch (grad.dtype) {
    case DType::float64: return sum_dense<double, ahead>(grad);
    case DType::float16: return sum_dense<f16, ahead>(grad);
    case DType::bfloat16: return sum_dense<bf16, ahead>(grad);
    default: return sum_dense<float, ahead>(grad);
  }
}

// --- sums of chunk sums -----------------------------------------------------------------------

/// What another block, or another thread of this one, has written meanwhile.
__device__ __forceinline__ double read_anew(const double* at) {
  return *static_cast<const volatile double*>(at);
}

/// Of up to tile_size values, for all lanes of a warp.
__device__ __forceinline__ double sum_by_warp(const double* values, std::uint32_t count) {
  double sum = 0.0;
  for (std::uint32_t i = threadIdx.x % warp_size; i < count; i += norm_tree::lanes)
    sum += read_anew(values + i);
  return fold_lanes<norm_tree::lanes>(sum);
}

/// Of any number of values, for all threads of a block.
__device__ __forceinline__ double sum_by_block(const double* values, std::uint32_t count,
                                               double* scratch) {
  constexpr std::uint32_t size = norm_tree::tile_size;
  while (count > 1) {
    const std::uint32_t groups = (count + size - 1) / size;
    for (std::uint32_t g = threadIdx.x / warp_size; g < groups; g += warps) {
      const std::uint32_t left = count - g * size;
      const double sum = sum_by_warp(values + std::size_t{g} * size, left < size ? left : size);
      if (threadIdx.x % warp_size == 0) scratch[g] = sum;
    }
    __syncthreads();
    values = scratch;
    scratch += groups;
    count = groups;
  }
  const double sum = count == 1 ? read_anew(values) : 0.0;
  __syncthreads();  // the scratch may be overwritten now
  return sum;
}

}  // namespace fusedstep::cuda
