#pragma once
#include <cstdint>
#include <cstring>

#include "core/norm_tree.hpp"
#include "cpu/storage.hpp"

/// The chunk sums of the norm tree (core/norm_tree.hpp). Included by the kernel objects only, like
/// cpu/pack.hpp.
namespace fusedstep::cpu {
namespace {

// --- doubles in flight ------------------------------------------------------------------------

/// The register that elements of type T are widened to.
template <class T>
struct Wide {
  using type = Pack<double>;
};
#if defined(__AVX2__)
// Also under AVX-512: Zen 4 widens 23 elements per ns to 256 bits, 12 to 512 (research, 2026).
template <>
struct Wide<float> {
  using type = Simd<double, 4>;
};
#endif

/// Registers that hold one row of the tree.
template <class D>
constexpr int row_registers = norm_tree::lanes / width<D>;

// --- loading a row ----------------------------------------------------------------------------
// Lane order may differ from element order as long as the fold below pairs the right lanes.

#define FUSEDSTEP_UNROLL _Pragma("GCC unroll 32")

FUSEDSTEP_HD void load_row(const float* x, double* row) {
  for (int i = 0; i < norm_tree::lanes; ++i) row[i] = static_cast<double>(read(x + i));
}
FUSEDSTEP_HD void load_row(const f16* x, double* row) {
  for (int i = 0; i < norm_tree::lanes; ++i) row[i] = static_cast<double>(to_float(read(x + i)));
}
/// bfloat16: the even elements first, then the odd ones.
FUSEDSTEP_HD void load_row(const bf16* x, double* row) {
  constexpr int half = norm_tree::lanes / 2;
  for (int i = 0; i < half; ++i) {
    row[i] = static_cast<double>(to_float(read(x + 2 * i)));
    row[half + i] = static_cast<double>(to_float(read(x + 2 * i + 1)));
  }
}
template <class D>
FUSEDSTEP_HD void load_row(const double* x, D* row) {
  FUSEDSTEP_UNROLL
  for (int k = 0; k < row_registers<D>; ++k) load(row[k], x + k * width<D>);
}

#if defined(__AVX2__)

FUSEDSTEP_HD __m256 even_bf16(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
FUSEDSTEP_HD __m256 odd_bf16(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
}
FUSEDSTEP_HD void load_row(const float* x, Simd<double, 4>* row) {
  FUSEDSTEP_UNROLL
  for (int k = 0; k < 8; ++k) row[k] = _mm256_cvtps_pd(_mm_loadu_ps(x + 4 * k));
}

#endif
#if defined(__AVX512F__)

FUSEDSTEP_HD void load_row(const f16* x, Simd<double, 8>* row) {
  FUSEDSTEP_UNROLL
  for (int k = 0; k < 4; ++k) {
    const auto* eight = reinterpret_cast<const __m128i*>(x + 8 * k);
    row[k] = _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(eight)));
  }
}
FUSEDSTEP_HD void load_row(const bf16* x, Simd<double, 8>* row) {
  FUSEDSTEP_UNROLL
  for (int k = 0; k < 2; ++k) {
    const __m256i pairs = load_16_bits(x + 16 * k);
    row[k] = _mm512_cvtps_pd(even_bf16(pairs));
    row[2 + k] = _mm512_cvtps_pd(odd_bf16(pairs));
  }
}

#elif defined(__AVX2__)

FUSEDSTEP_HD void widen(__m256 x, Simd<double, 4>& low, Simd<double, 4>& high) {
  low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
}
FUSEDSTEP_HD void load_row(const f16* x, Simd<double, 4>* row) {
  FUSEDSTEP_UNROLL
  for (int k = 0; k < 4; ++k)
    widen(_mm256_cvtph_ps(load_16_bits(x + 8 * k)), row[2 * k], row[2 * k + 1]);
}
FUSEDSTEP_HD void load_row(const bf16* x, Simd<double, 4>* row) {
  FUSEDSTEP_UNROLL
  for (int k = 0; k < 2; ++k) {
    const auto* pairs = reinterpret_cast<const __m256i*>(x + 16 * k);
    widen(even_bf16(_mm256_loadu_si256(pairs)), row[2 * k], row[2 * k + 1]);
    widen(odd_bf16(_mm256_loadu_si256(pairs)), row[4 + 2 * k], row[5 + 2 * k]);
  }
}

#endif

// --- the tree ---------------------------------------------------------------------------------

/// sum + (scale*x)^2. The square of anything but a float64 is exact in float64, so there a fused
/// operation gives the same bits.
template <class T, bool scaled, class D>
FUSEDSTEP_HD D add_square(D sum, D x, D scale) {
  if constexpr (scaled) x = x * scale;
  if constexpr (!scaled && sizeof(T) < sizeof(double) && width<D> > 1) return fma(x, x, sum);
  return sum + x * x;
}

/// Asks for the memory of rows to come. Widening fills the processor's window with so many
/// operations that it does not reach far enough ahead itself: 1.35 times the speed in memory on a
/// Sapphire Rapids, 1.0 on a Zen 4, nothing lost in cache. (The update loop gains nothing.)
template <class T>
FUSEDSTEP_HD void prefetch_row(const T* x) {
  constexpr unsigned ahead = 2048, line = 64;                              // bytes
  const std::uintptr_t row = reinterpret_cast<std::uintptr_t>(x) + ahead;  // may be past the end
  FUSEDSTEP_UNROLL
  for (unsigned i = 0; i < norm_tree::lanes * sizeof(T); i += line)
    __builtin_prefetch(reinterpret_cast<const void*>(row + i));
}

template <class T, bool scaled, class D>
FUSEDSTEP_HD void add_row(const T* x, D* sums, D scale) {
  D row[row_registers<D>];
  prefetch_row(x);
  load_row(x, row);
  FUSEDSTEP_UNROLL
  for (int k = 0; k < row_registers<D>; ++k)
    sums[k] = add_square<T, scaled>(sums[k], row[k], scale);
}

/// Folds `n` registers, then the lanes of the last one.
template <int n, class D>
FUSEDSTEP_HD double fold_registers(D* sums) {
  FUSEDSTEP_UNROLL
  for (int half = n / 2; half >= 1; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] = sums[k] + sums[k + half];
  double lanes[width<D>];
  store(sums[0], lanes);
  return norm_tree::fold<width<D>>(lanes);
}

template <class T, class D>
FUSEDSTEP_HD double fold_row(const T* /*type*/, D* sums) {
  return fold_registers<row_registers<D>>(sums);
}
/// The even and the odd lanes meet in the last step of the fold.
template <class D>
FUSEDSTEP_HD double fold_row(const bf16* /*type*/, D* sums) {
  constexpr int half = row_registers<D> / 2;
  return fold_registers<half>(sums) + fold_registers<half>(sums + half);
}

template <class T, bool scaled>
double sum_tile(const T* x, std::int64_t count, double scale) {
  using D = typename Wide<T>::type;
  D sums[row_registers<D>];
  FUSEDSTEP_UNROLL
  for (int k = 0; k < row_registers<D>; ++k) sums[k] = D(0.0);
  const T* const last_row = x + count / norm_tree::lanes * norm_tree::lanes;
  for (; x != last_row; x += norm_tree::lanes) add_row<T, scaled>(x, sums, D(scale));
  const auto rest = static_cast<std::size_t>(count % norm_tree::lanes);
  if (rest > 0) {
    T padded[norm_tree::lanes] = {};
    std::memcpy(padded, x, rest * sizeof(T));
    add_row<T, scaled>(padded, sums, D(scale));
  }
  return fold_row(x, sums);
}

template <class T, bool scaled>
double sum_chunk(const void* data, std::int64_t count, double scale) {
  const T* x = static_cast<const T*>(data);
  double sums[norm_tree::tiles] = {};
  for (int k = 0; count > 0; ++k, x += norm_tree::tile_size, count -= norm_tree::tile_size) {
    const bool full = count > norm_tree::tile_size;
    sums[k] = sum_tile<T, scaled>(x, full ? norm_tree::tile_size : count, scale);
  }
  return norm_tree::fold<norm_tree::tiles>(sums);
}

template <bool scaled>
double sum_chunk(const void* x, DType dtype, std::int64_t count, double scale) {
  switch (dtype) {
    case DType::float64: return sum_chunk<double, scaled>(x, count, scale);
    case DType::float16: return sum_chunk<f16, scaled>(x, count, scale);
    case DType::bfloat16: return sum_chunk<bf16, scaled>(x, count, scale);
    default: return sum_chunk<float, scaled>(x, count, scale);
  }
}

double sum_squares(const void* x, DType dtype, std::int64_t count, double scale) {
  return scale == 1.0 ? sum_chunk<false>(x, dtype, count, scale)
                      : sum_chunk<true>(x, dtype, count, scale);
}

// --- the largest magnitude --------------------------------------------------------------------

/// Magnitudes order like their bits, with NaN on top.
template <class T, class Arithmetic>
double largest_magnitude(const void* data, std::int64_t count) {
  std::uint64_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    Arithmetic element;
    load(element, static_cast<const T*>(data) + i);
    const double x = static_cast<double>(element);
    std::uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= ~std::uint64_t{0} >> 1;
    largest = bits > largest ? bits : largest;
  }
  double result;
  std::memcpy(&result, &largest, sizeof result);
  return result;
}

double max_abs(const void* x, DType dtype, std::int64_t count) {
  switch (dtype) {
    case DType::float64: return largest_magnitude<double, double>(x, count);
    case DType::float16: return largest_magnitude<f16, float>(x, count);
    case DType::bfloat16: return largest_magnitude<bf16, float>(x, count);
    default: return largest_magnitude<float, float>(x, count);
  }
}

}  // namespace
}  // namespace fusedstep::cpu
