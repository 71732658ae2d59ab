#pragma once
#include <cstdint>
#include <cstring>

#include "core/hd.hpp"
#include "core/types.hpp"

/// float16 and bfloat16 to and from float32, by bits: every scalar path uses these, on every
/// instruction set. They agree with F16C bit for bit, NaN payloads included, and do not depend on
/// the floating-point environment. (Only integers here; tests go through every case.) Every GPU has
/// instructions for float16, with the same bits but for NaN payloads.
namespace fusedstep {

FUSEDSTEP_HD std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FUSEDSTEP_HD float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

/// x / 2^shift, rounded to nearest even; 0 < shift < 32, and the bias must not carry out of x.
FUSEDSTEP_HD std::uint32_t shift_right_rounded(std::uint32_t x, std::uint32_t shift) {
  const std::uint32_t odd = (x >> shift) & 1u;
  return (x + (1u << (shift - 1)) - 1u + odd) >> shift;
}

FUSEDSTEP_HD float to_float(bf16 x) { return float_of(std::uint32_t{x.bits} << 16); }

FUSEDSTEP_HD bf16 to_bf16(float x) {
  const std::uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could carry it into infinity
  return {static_cast<std::uint16_t>(nan ? 0x7fc0u : shift_right_rounded(bits, 16))};
}

FUSEDSTEP_HD float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(x.bits));
  return converted;
#else
  const std::uint32_t sign = (x.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 31u;
  std::uint32_t fraction = x.bits & 0x3ffu;
  if (exponent == 31)  // infinity, or NaN made quiet
    return float_of(sign | 0x7f800000u | (fraction ? 0x400000u | (fraction << 13) : 0u));
  if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
  if (fraction == 0) return float_of(sign);
  std::uint32_t shifted = 113;  // subnormal: every float16 is a normal float32
  for (; !(fraction & 0x400u); --shifted) fraction <<= 1;
  return float_of(sign | (shifted << 23) | ((fraction & 0x3ffu) << 13));
#endif
}

FUSEDSTEP_HD f16 to_f16(float x) {
#if defined(__CUDA_ARCH__)
  f16 converted;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(converted.bits) : "f"(x));
  return converted;
#else
  const std::uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  const std::uint32_t exponent = magnitude >> 23;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x1ffu);  // quiet NaN
  } else if (exponent >= 143) {
    half = 0x7c00u;  // 65536 and more
  } else if (exponent >= 113) {
    half = shift_right_rounded(magnitude - (112u << 23), 13);  // 65520 and more carry to infinity
  } else if (exponent >= 102) {
    half = shift_right_rounded((magnitude & 0x7fffffu) | 0x800000u, 126 - exponent);  // subnormal
  } else {
    half = 0;
  }
  return {static_cast<std::uint16_t>(sign | half)};
#endif
}

}  // namespace fusedstep
