#pragma once
#include <type_traits>

#include "core/blocks.hpp"
#include "cuda/settle.hpp"
#include "cuda/walk.hpp"

/// The update of a chunk by a block of threads, for every rule and storage.
namespace fusedstep::cuda {

// --- what a chunk is updated from and by ------------------------------------------------------

/// Keeps what is constant over a chunk as it is, in registers. The compiler would rather convert a
/// double where a formula needs it, for every element; most GPUs do two of that per clock.
template <class Constants>
__device__ __forceinline__ void keep(Constants& constants) {
#if defined(__CUDA_ARCH__)
  std::uint32_t words[sizeof constants / sizeof(std::uint32_t)];
  static_assert(sizeof words == sizeof constants);
  memcpy(words, &constants, sizeof words);
#pragma unroll
  for (std::uint32_t& word : words) asm volatile("" : "+r"(word));
  memcpy(&constants, words, sizeof words);
#else
  static_cast<void>(constants);
#endif
}

/// What is constant over one chunk, rounded once to the arithmetic type T.
template <class Rule, class T>
struct Constants {
  Conditioning<T> conditioning;
  typename Rule::template Coefficients<T> coefficients;

  __device__ __forceinline__ explicit Constants(const RowConstants& row)
      : conditioning{static_cast<T>(row.conditioning.scale), static_cast<T>(row.conditioning.limit),
                     row.conditioning.scales, row.conditioning.limits},
        coefficients(&row.coefficients[0]) {
    keep(conditioning);
    keep(coefficients);
  }
};

/// The buffers of one chunk.
struct Buffers {
  Stream param, grad, copy;
  Stream slots[max_slots];
  void* aux[max_slots];
  const LayoutRecord* layout;  ///< or null
  std::int64_t begin;          ///< of the chunk
  int count, shift;
};

template <int num_slots>
__device__ __forceinline__ Buffers buffers_of(const Table& table, std::uint32_t t,
                                              std::uint32_t chunk) {
  const TensorRecord& tensor = table.tensor(t);
  Buffers at;
  at.begin = std::int64_t{chunk - table.first_chunks()[t]} * chunk_size;
  const std::int64_t left = tensor.numel - at.begin;
  at.count = static_cast<int>(left < chunk_size ? left : chunk_size);
  at.shift = tensor.shift;
  at.layout = table.layout(t);
  const int vector =
      tensor.param_dtype == DType::float64 ? vector_size<double> : vector_size<float>;
  const auto stream = [&](const void* data, DType dtype, std::int64_t begin) {
    const std::size_t size = size_of(dtype);
    auto* const here = static_cast<char*>(const_cast<void*>(data));
    const std::int64_t skipped = here ? begin * static_cast<std::int64_t>(size) : 0;
    const Address first{reinterpret_cast<std::uintptr_t>(here + skipped), size};
    return Stream{here + skipped, dtype, is_aligned(first, at.shift, vector)};
  };
  at.param = stream(tensor.param, tensor.param_dtype, at.begin);
  at.grad = stream(table.grad(t), tensor.grad_dtype, at.layout ? 0 : at.begin);
  at.copy = stream(tensor.copy, tensor.copy_dtype, at.begin);
#pragma unroll
  for (int s = 0; s < num_slots; ++s) {
    at.slots[s] = stream(tensor.slots[s], tensor.slot_dtypes[s], at.begin);
    void* const aux = table.has_extras ? table.extra(t).aux[s] : nullptr;
    at.aux[s] = aux ? static_cast<float*>(aux) + at.begin / block_size : nullptr;
  }
  return at;
}

/// One element of every buffer.
template <class T>
struct Element {
  T param, grad, slots[max_slots];
};

template <class Rule, class T>
__device__ __forceinline__ void apply(const Constants<Rule, T>& k, Element<T>& x) {
  Rule::apply(k.coefficients, x.param, condition(k.conditioning, x.grad), x.slots);
}

// --- by vectors -------------------------------------------------------------------------------

/// A vector of every buffer, as it lies in memory.
template <int num_slots>
struct Vectors {
  Words param, grad, slots[num_slots + 1];
};

template <class Access, int num_slots>
__device__ __forceinline__ void load(Vectors<num_slots>& raw, const Buffers& at,
                                     const Place& place) {
  Access::load(at.param, place, raw.param);
  Access::load(at.grad, place, raw.grad);
#pragma unroll
  for (int s = 0; s < num_slots; ++s) Access::load(at.slots[s], place, raw.slots[s]);
}

template <class Access, class Rule, class T>
__device__ __forceinline__ void update_vector(const Constants<Rule, T>& k,
                                              const Vectors<num_slots<Rule>>& raw,
                                              const Buffers& at, const Place& place) {
  constexpr int n = vector_size<T>, slots = num_slots<Rule>;
  T param[n], grad[n], states[slots + 1][n];
  Access::decode(raw.param, at.param.dtype, param);
  Access::decode(raw.grad, at.grad.dtype, grad);
#pragma unroll
  for (int s = 0; s < slots; ++s) Access::decode(raw.slots[s], at.slots[s].dtype, states[s]);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    Element<T> x;
    x.param = param[j];
    x.grad = grad[j];
#pragma unroll
    for (int s = 0; s < slots; ++s) x.slots[s] = states[s][j];
    apply(k, x);
    param[j] = x.param;
#pragma unroll
    for (int s = 0; s < slots; ++s) states[s][j] = x.slots[s];
  }
  Access::store(param, at.param, place);
  if constexpr (std::is_same_v<Access, Mixed>) {
    if (at.copy.data) Access::store(param, at.copy, place);
  }
#pragma unroll
  for (int s = 0; s < slots; ++s) Access::store(states[s], at.slots[s], place);
}

/// Vectors of every buffer that a thread asks for before it uses the first of them. Those of 16-bit
/// types are short, so it takes two to keep a fast memory busy; more state leaves no registers for
/// it.
template <class Access, class Rule>
constexpr int vectors_per_round = std::is_same_v<Access, Mixed> && num_slots<Rule> <= 2 ? 2 : 1;

template <class Access, class Rule>
__device__ __forceinline__ void update_by_vectors(const RowConstants& row, const Buffers& at) {
  using T = typename Access::Real;
  constexpr int n = vector_size<T>, stride = threads * n, round = vectors_per_round<Access, Rule>;
  const Constants<Rule, T> k(row);
  const auto place = [&](int i) { return Place{i, at.count, i >= 0 && i + n <= at.count}; };
  int first = static_cast<int>(threadIdx.x) * n - at.shift;
#pragma unroll 1
  for (; first < at.count; first += round * stride) {
    Vectors<num_slots<Rule>> raw[round];
#pragma unroll
    for (int v = 0; v < round; ++v) {
      const int i = first + v * stride;
      if (i < at.count) load<Access>(raw[v], at, place(i));
    }
#pragma unroll
    for (int v = 0; v < round; ++v) {
      const int i = first + v * stride;
      if (i < at.count) update_vector<Access>(k, raw[v], at, place(i));
    }
  }
}

// --- by elements ------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T grad_at(const Buffers& at, int i) {
  if (at.layout) return gather_one<T>(at.grad.data, *at.layout, at.begin + i);
  T grad;
  load_one(at.grad.data, at.grad.dtype, i, grad);
  return grad;
}

template <class Rule, class T>
__device__ __forceinline__ void update_by_elements(const RowConstants& row, const Buffers& at) {
  constexpr int slots = num_slots<Rule>;
  const Constants<Rule, T> k(row);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < at.count; i += threads) {
    Element<T> x;
    x.grad = grad_at<T>(at, i);
    load_one(at.param.data, at.param.dtype, i, x.param);
#pragma unroll
    for (int s = 0; s < slots; ++s) load_one(at.slots[s].data, at.slots[s].dtype, i, x.slots[s]);
    apply(k, x);
    store_one(x.param, at.param.data, at.param.dtype, i);
    if (at.copy.data) store_one(x.param, at.copy.data, at.copy.dtype, i);
#pragma unroll
    for (int s = 0; s < slots; ++s) store_one(x.slots[s], at.slots[s].data, at.slots[s].dtype, i);
  }
}

// --- states in blocks with a scale ------------------------------------------------------------

/// The state `s` of element `i`; `scale` is that of its block.
__device__ __forceinline__ float load_state(const Stream& from, float scale, int i) {
  if (from.dtype != DType::int8_blocks) return load_float(from.data, from.dtype, i);
  return decoded(static_cast<std::int8_t>(from.data[i]), scale);
}
__device__ __forceinline__ void store_state(float x, const Stream& to, float scale, int i) {
  if (to.dtype != DType::int8_blocks) return store_float(x, to.data, to.dtype, i);
  to.data[i] = static_cast<char>(encoded(x, scale));
}

template <int num_slots>
__device__ __forceinline__ void load_with_scales(Element<float>& x, const Buffers& at,
                                                 const float* scales, int i) {
  x.grad = grad_at<float>(at, i);
  x.param = load_float(at.param.data, at.param.dtype, i);
#pragma unroll
  for (int s = 0; s < num_slots; ++s) x.slots[s] = load_state(at.slots[s], scales[s], i);
}

/// The largest magnitude of a warp, by bits: NaN is larger than all.
__device__ __forceinline__ float largest_in_warp(std::uint32_t magnitude) {
#pragma unroll
  for (int half = warp_size / 2; half >= 1; half /= 2) {
    const std::uint32_t other = __shfl_xor_sync(all_lanes, magnitude, half);
    magnitude = other > magnitude ? other : magnitude;
  }
  return float_of(magnitude);
}

/// A warp per block, twice: a block's new scale is known only when all of it has been computed.
template <class Rule>
__device__ __forceinline__ void update_blocks(const RowConstants& row, const Buffers& at) {
  const Constants<Rule, float> k(row);
  constexpr int size = static_cast<int>(block_size), slots = num_slots<Rule>;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll 1
  for (int begin = static_cast<int>(threadIdx.x) / warp_size * size; begin < at.count;
       begin += warps * size) {
    const int end = at.count - begin < size ? at.count : begin + size;
    float scales[slots + 1] = {}, new_scales[slots + 1];
    std::uint32_t largest[slots + 1] = {};
    Element<float> x;
#pragma unroll
    for (int s = 0; s < slots; ++s)
      if (at.aux[s]) scales[s] = static_cast<const float*>(at.aux[s])[begin / block_size];
#pragma unroll 1
    for (int i = begin + lane; i < end; i += warp_size) {
      load_with_scales<slots>(x, at, scales, i);
      apply(k, x);
#pragma unroll
      for (int s = 0; s < slots; ++s) {
        const std::uint32_t magnitude = bits_of(x.slots[s]) & 0x7fffffffu;
        largest[s] = magnitude > largest[s] ? magnitude : largest[s];
      }
    }
    __syncwarp();  // all have read the old ones: a shuffle orders nothing in memory
#pragma unroll
    for (int s = 0; s < slots; ++s) {
      new_scales[s] = scale_of_block(largest_in_warp(largest[s]));
      if (at.aux[s] && lane == 0)
        static_cast<float*>(at.aux[s])[begin / block_size] = new_scales[s];
    }
#pragma unroll 1
    for (int i = begin + lane; i < end; i += warp_size) {
      load_with_scales<slots>(x, at, scales, i);
      apply(k, x);
      store_float(x.param, at.param.data, at.param.dtype, i);
      if (at.copy.data) store_float(x.param, at.copy.data, at.copy.dtype, i);
#pragma unroll
      for (int s = 0; s < slots; ++s) store_state(x.slots[s], at.slots[s], new_scales[s], i);
    }
  }
}

// --- a chunk ----------------------------------------------------------------------------------

/// Whatever the form of a tensor is.
template <class Rule>
__device__ __forceinline__ void update_any(const RowConstants& row, const TensorRecord& tensor,
                                           const Buffers& at) {
  if (tensor.blocks) return update_blocks<Rule>(row, at);
  tensor.param_dtype == DType::float64 ? update_by_elements<Rule, double>(row, at)
                                       : update_by_elements<Rule, float>(row, at);
}

/// The sum of squares of the new parameters, which are in cache.
template <Access access>
__device__ __forceinline__ void report_sum(const Table& table, std::uint32_t t, const Buffers& at) {
  __syncthreads();
  const std::int64_t k = at.begin / chunk_size;
  GradChunk results{at.param.data, nullptr, 0, at.param.dtype, at.count};
  if constexpr (access == Access::float32) results.dtype = DType::float32;
  if constexpr (access == Access::float64) results.dtype = DType::float64;
  const double sum = sum_chunk<little_ahead>(results);
  if (threadIdx.x == 0) table.chunk_sums(t)[k] = sum;
}

}  // namespace fusedstep::cuda
