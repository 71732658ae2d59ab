#pragma once
#include <cstdint>
#include <cstring>

#include "core/blocks.hpp"
#include "core/float16.hpp"
#include "core/step.hpp"
#include "cpu/pack.hpp"

/// How buffers are read into and written from arithmetic values (numbers or registers). Included by
/// the kernel objects only, like cpu/pack.hpp. Addresses need not even be aligned to their type.
namespace fusedstep::cpu {
namespace {

// --- one number -------------------------------------------------------------------------------

template <class T>
FUSEDSTEP_HD T read(const T* at) {
  T x;
  std::memcpy(&x, at, sizeof x);
  return x;
}
template <class T>
FUSEDSTEP_HD void write(T x, T* at) {
  std::memcpy(at, &x, sizeof x);
}

FUSEDSTEP_HD void load(float& out, const float* at) { out = read(at); }
FUSEDSTEP_HD void load(float& out, const f16* at) { out = to_float(read(at)); }
FUSEDSTEP_HD void load(float& out, const bf16* at) { out = to_float(read(at)); }
FUSEDSTEP_HD void load(double& out, const double* at) { out = read(at); }

FUSEDSTEP_HD void store(float x, float* at) { write(x, at); }
FUSEDSTEP_HD void store(float x, f16* at) { write(to_f16(x), at); }
FUSEDSTEP_HD void store(float x, bf16* at) { write(to_bf16(x), at); }
FUSEDSTEP_HD void store(double x, double* at) { write(x, at); }

// --- one register -----------------------------------------------------------------------------

template <class T, int n>
FUSEDSTEP_HD void load(Simd<T, n>& out, const T* at) {
  out = Simd<T, n>::load(at);
}
template <class T, int n>
FUSEDSTEP_HD void store(Simd<T, n> x, T* at) {
  x.store(at);
}

#if defined(__AVX512F__)

constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

FUSEDSTEP_HD __m256i load_16_bits(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}
FUSEDSTEP_HD void load(Simd<float, 16>& out, const f16* at) {
  out = _mm512_cvtph_ps(load_16_bits(at));
}
FUSEDSTEP_HD void load(Simd<float, 16>& out, const bf16* at) {
  out = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16_bits(at)), 16));
}
FUSEDSTEP_HD void store(Simd<float, 16> x, f16* at) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtps_ph(x.reg, nearest));
}
/// to_bf16 of core/float16.hpp, step by step. (The AVX512_BF16 instruction flushes denormals.)
FUSEDSTEP_HD void store(Simd<float, 16> x, bf16* at) {
  const __m512i bits = _mm512_castps_si512(x.reg);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.reg, x.reg, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(out));
}

#elif defined(__AVX2__)

constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

FUSEDSTEP_HD __m128i load_16_bits(const void* at) {
  return _mm_loadu_si128(static_cast<const __m128i*>(at));
}
FUSEDSTEP_HD void load(Simd<float, 8>& out, const f16* at) {
  out = _mm256_cvtph_ps(load_16_bits(at));
}
FUSEDSTEP_HD void load(Simd<float, 8>& out, const bf16* at) {
  out = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bits(at)), 16));
}
FUSEDSTEP_HD void store(Simd<float, 8> x, f16* at) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_cvtps_ph(x.reg, nearest));
}
/// to_bf16 of core/float16.hpp, step by step.
FUSEDSTEP_HD void store(Simd<float, 8> x, bf16* at) {
  const __m256i bits = _mm256_castps_si256(x.reg);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.reg, x.reg, _CMP_UNORD_Q));
  const __m256i out = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i low = _mm256_castsi256_si128(out), high = _mm256_extracti128_si256(out, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm_packus_epi32(low, high));
}

#endif

// --- whole runs: storage that is not read element by element, or rarely -----------------------

/// `count` stored elements -> float32.
template <class T>
void decode_elements(const T* stored, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (Pack<float> x; i + width<Pack<float>> <= count; i += width<Pack<float>>) {
    load(x, stored + i);
    store(x, out + i);
  }
  for (; i < count; ++i) load(out[i], stored + i);
}

template <class T>
void encode_elements(const float* x, std::int64_t count, T* stored) {
  std::int64_t i = 0;
  for (Pack<float> pack; i + width<Pack<float>> <= count; i += width<Pack<float>>) {
    load(pack, x + i);
    store(pack, stored + i);
  }
  for (; i < count; ++i) store(x[i], stored + i);
}

/// int8 codes and one scale -> `count` <= block_size values.
void decode_block(const std::int8_t* codes, const float* scale, std::int64_t count, float* out) {
  const float factor = read(scale);
  for (std::int64_t i = 0; i < count; ++i) out[i] = decoded(codes[i], factor);
}

/// The largest |x|; NaN if any is NaN. (Magnitudes order like their bits, with NaN on top.)
float max_magnitude(const float* x, std::int64_t count) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t bits = bits_of(x[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return float_of(largest);
}

void encode_block(const float* x, std::int64_t count, std::int8_t* codes, float* scale) {
  const float factor = scale_of_block(max_magnitude(x, count));
  write(factor, scale);
  for (std::int64_t i = 0; i < count; ++i) codes[i] = encoded(x[i], factor);
}

/// Calls visit(codes, scale, first element, count) for every block.
template <class Visit>
FUSEDSTEP_HD void for_each_block(const Slot& slot, std::int64_t count, Visit visit) {
  auto* codes = static_cast<std::int8_t*>(slot.data);
  auto* scale = static_cast<float*>(slot.aux);
  for (std::int64_t i = 0; i < count; i += block_size, ++scale)
    visit(codes + i, scale, i, count - i < block_size ? count - i : block_size);
}

/// `count` elements of a buffer as float32; of int8_blocks from the start of a block on.
void decode(const Slot& from, std::int64_t count, float* out) {
  switch (from.dtype) {
    case DType::float16: return decode_elements(static_cast<const f16*>(from.data), count, out);
    case DType::bfloat16: return decode_elements(static_cast<const bf16*>(from.data), count, out);
    case DType::int8_blocks:
      return for_each_block(from, count, [&](auto* codes, auto* scale, auto i, auto n) {
        decode_block(codes, scale, n, out + i);
      });
    default: return decode_elements(static_cast<const float*>(from.data), count, out);
  }
}

void encode(const float* x, std::int64_t count, const Slot& to) {
  switch (to.dtype) {
    case DType::float16: return encode_elements(x, count, static_cast<f16*>(to.data));
    case DType::bfloat16: return encode_elements(x, count, static_cast<bf16*>(to.data));
    case DType::int8_blocks:
      return for_each_block(to, count, [&](auto* codes, auto* scale, auto i, auto n) {
        encode_block(x + i, n, codes, scale);
      });
    default: return encode_elements(x, count, static_cast<float*>(to.data));
  }
}

}  // namespace
}  // namespace fusedstep::cpu
