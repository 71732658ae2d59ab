#pragma once
#include <cuda_runtime.h>

#include <cstring>

#include "core/float16.hpp"
#include "cuda/table.hpp"

/// How buffers are read and written: vectors of elements where their address allows it, and one by
/// one where it does not, and at the ends.
namespace fusedstep::cuda {

// --- one element ------------------------------------------------------------------------------

/// An address in a buffer. They come from the table, so that the compiler does not know by itself
/// that they are not of shared or local memory.
template <class T>
__device__ __forceinline__ T* in_buffer(T* at) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(at));
#endif
  return at;
}

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(f16 x) { return to_float(x); }
__device__ __forceinline__ float widened(bf16 x) { return to_float(x); }

__device__ __forceinline__ float load_float(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::float16: return to_float(in_buffer(static_cast<const f16*>(data))[i]);
    case DType::bfloat16: return to_float(in_buffer(static_cast<const bf16*>(data))[i]);
    default: return in_buffer(static_cast<const float*>(data))[i];
  }
}
__device__ __forceinline__ void store_float(float x, void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::float16: in_buffer(static_cast<f16*>(data))[i] = to_f16(x); break;
    case DType::bfloat16: in_buffer(static_cast<bf16*>(data))[i] = to_bf16(x); break;
    default: in_buffer(static_cast<float*>(data))[i] = x;
  }
}

__device__ __forceinline__ void load_one(const void* data, DType dtype, std::int64_t i, float& x) {
  x = load_float(data, dtype, i);
}
__device__ __forceinline__ void load_one(const void* data, DType /*float64*/, std::int64_t i,
                                         double& x) {
  x = in_buffer(static_cast<const double*>(data))[i];
}
__device__ __forceinline__ void store_one(float x, void* data, DType dtype, std::int64_t i) {
  store_float(x, data, dtype, i);
}
__device__ __forceinline__ void store_one(double x, void* data, DType /*float64*/, std::int64_t i) {
  in_buffer(static_cast<double*>(data))[i] = x;
}

/// Element `i`, in the parameter's memory order, of a gradient that has to be gathered: rounded
/// once to T.
template <class T>
__device__ __forceinline__ T gather_one(const void* data, const LayoutRecord& layout,
                                        std::int64_t i) {
  const auto* const shape = reinterpret_cast<const std::int64_t*>(&layout + 1);
  const std::int64_t* const strides = shape + layout.ndim;
  const char* at = static_cast<const char*>(data);
  for (std::int64_t d = layout.ndim - 1; d >= 0; --d) {
    const std::int64_t outer = i / shape[d];
    at += (i - outer * shape[d]) * strides[d];
    i = outer;
  }
  switch (static_cast<GradLayout::Source>(layout.source)) {
    case GradLayout::Source::float16: return to_float(*reinterpret_cast<const f16*>(at));
    case GradLayout::Source::bfloat16: return to_float(*reinterpret_cast<const bf16*>(at));
    case GradLayout::Source::float64: return static_cast<T>(*reinterpret_cast<const double*>(at));
    default: return *reinterpret_cast<const float*>(at);
  }
}

// --- vectors ----------------------------------------------------------------------------------
// Two float64, or four elements of any other type: 16 bytes, or 8 of 16-bit types. A vector that is
// not whole, at the ends of a chunk, and one whose address is no multiple of its size, is accessed
// by elements.

template <class T>
constexpr int vector_size = sizeof(T) == sizeof(double) ? 2 : 4;

/// The elements of a chunk in one buffer.
struct Stream {
  char* data;
  DType dtype;
  bool aligned;  ///< vectors begin at multiples of their size: the same for a whole block
};

/// Elements [first, first + vector_size) of a chunk; what of that is inside is to be accessed.
struct Place {
  int first, count;
  bool whole;
};

/// A vector as it lies in memory; of 16-bit types the first two words.
using Words = uint4;

template <class Word, class Piece>
__device__ __forceinline__ void load_words(const Stream& from, const Place& at, Words& words) {
  const auto* const first = in_buffer(reinterpret_cast<const Piece*>(from.data)) + at.first;
  if (from.aligned && at.whole) {
    const Word word = *reinterpret_cast<const Word*>(first);
    memcpy(&words, &word, sizeof word);
    return;
  }
  constexpr int n = static_cast<int>(sizeof(Word) / sizeof(Piece));
  Piece pieces[n];
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const int i = at.first + k;
    pieces[k] = i >= 0 && i < at.count ? first[k] : Piece(0);
  }
  memcpy(&words, pieces, sizeof pieces);
}

template <class Word, class Piece>
__device__ __forceinline__ void store_words(const Words& words, const Stream& to, const Place& at) {
  auto* const first = in_buffer(reinterpret_cast<Piece*>(to.data)) + at.first;
  if (to.aligned && at.whole) {
    Word word;
    memcpy(&word, &words, sizeof word);
    *reinterpret_cast<Word*>(first) = word;
    return;
  }
  constexpr int n = static_cast<int>(sizeof(Word) / sizeof(Piece));
  Piece pieces[n];
  memcpy(pieces, &words, sizeof pieces);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const int i = at.first + k;
    if (i >= 0 && i < at.count) first[k] = pieces[k];
  }
}

/// Buffers that all have the type of the arithmetic.
template <class T>
struct Uniform {
  using Real = T;

  __device__ __forceinline__ static void load(const Stream& from, const Place& at, Words& words) {
    load_words<uint4, T>(from, at, words);
  }
  __device__ __forceinline__ static void decode(const Words& words, DType /*dtype*/, T* x) {
    memcpy(x, &words, sizeof words);
  }
  __device__ __forceinline__ static void store(const T* x, const Stream& to, const Place& at) {
    Words words;
    memcpy(&words, x, sizeof words);
    store_words<uint4, T>(words, to, at);
  }
};

/// Buffers of types known at run time, none of them float64.
struct Mixed {
  using Real = float;
  static constexpr int n = vector_size<float>;

  __device__ __forceinline__ static void load(const Stream& from, const Place& at, Words& words) {
    if (from.dtype == DType::float32) {
      load_words<uint4, float>(from, at, words);
    } else {
      load_words<uint2, std::uint16_t>(from, at, words);
    }
  }
  __device__ __forceinline__ static void decode(const Words& words, DType dtype, float* x) {
    if (dtype == DType::float32) {
      memcpy(x, &words, n * sizeof(float));
      return;
    }
    std::uint16_t bits[n];
    memcpy(bits, &words, sizeof bits);
#pragma unroll
    for (int k = 0; k < n; ++k)
      x[k] = dtype == DType::float16 ? to_float(f16{bits[k]}) : to_float(bf16{bits[k]});
  }
  __device__ __forceinline__ static void store(const float* x, const Stream& to, const Place& at) {
    Words words;
    if (to.dtype == DType::float32) {
      memcpy(&words, x, n * sizeof(float));
      store_words<uint4, float>(words, to, at);
      return;
    }
    std::uint16_t bits[n];
#pragma unroll
    for (int k = 0; k < n; ++k)
      bits[k] = to.dtype == DType::float16 ? to_f16(x[k]).bits : to_bf16(x[k]).bits;
    memcpy(&words, bits, sizeof bits);
    store_words<uint2, std::uint16_t>(words, to, at);
  }
};

}  // namespace fusedstep::cuda
