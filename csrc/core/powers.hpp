#pragma once
#include <cstdint>

#include "core/hd.hpp"

/// Powers in double, from exactly rounded operations only: the same bits from every C library and
/// on a device, which `pow` and `exp` do not promise.
namespace fusedstep {

/// base^n by repeated squaring, n >= 0. The relative error is below n * 2^-53.
FUSEDSTEP_HD double power(double base, std::int64_t n) {
  double result = 1.0;
  FUSEDSTEP_LOOP
  for (; n > 0; n >>= 1, base *= base)
    if (n & 1) result *= base;
  return result;
}

/// 1 - base^n by repeated squaring, n >= 0, without the cancellation of a base close to 1:
/// 1 - b^2 = (1 - b)(1 + b) and 1 - b^(m+n) = (1 - b^m) + b^m (1 - b^n).
FUSEDSTEP_HD double one_minus_power(double base, std::int64_t n) {
  double result = 0.0, done = 1.0, rest = 1.0 - base;  // `done` is 1 - result, to its own rounding
  FUSEDSTEP_LOOP
  for (; n > 0; n >>= 1, rest *= 1.0 + base, base *= base) {
    if (n & 1) {
      result += done * rest;
      done *= base;
    }
  }
  return result;
}

/// e^x for x <= 0: 2^-n e^r with |r| <= ln(2)/2, and the Taylor series of e^r.
FUSEDSTEP_HD double exp_of_negative(double x) {
  constexpr double log2_of_e = 0x1.71547652b82fep+0;
  constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;  // high*n is exact
  constexpr int degree = 14;
  if (!(x > -746.0)) return x == x ? 0.0 : x;
  const double n = ::floor(0.5 - x * log2_of_e);
  const double r = (x + n * ln2_high) + n * ln2_low;
  double sum = 1.0;
  FUSEDSTEP_LOOP
  for (int k = degree; k > 0; --k) sum = 1.0 + sum * r / k;
  return sum * power(0.5, static_cast<std::int64_t>(n));
}

}  // namespace fusedstep
