#pragma once
#include <cstdint>

#include "core/hd.hpp"

/// What is done with norms after the tree (core/norm_tree.hpp), on the host and on a device.
namespace fusedstep {

FUSEDSTEP_HD bool is_finite(double x) { return x - x == 0; }

/// The sign and payload of NaN depend on the instruction set.
FUSEDSTEP_HD double plain_nan(double x) { return x == x ? x : static_cast<double>(NAN); }

/// Of several parts together, from their norms. Scaled by a power of two, which is exact, so that
/// large norms do not overflow.
FUSEDSTEP_HD double joined_norm(const double* norms, std::int64_t count) {
  double largest = 0, sum = 0;
  for (std::int64_t k = 0; k < count; ++k) largest = norms[k] > largest ? norms[k] : largest;
  const bool scalable = largest > 0 && is_finite(largest);
  const int exponent = scalable ? ::ilogb(largest) : 0;
  for (std::int64_t k = 0; k < count; ++k) {
    const double norm = ::ldexp(norms[k], -exponent);
    sum += norm * norm;
  }
  return plain_nan(::ldexp(::sqrt(sum), exponent));
}

/// Whether a step is left out for its norm. An infinite limit refuses nothing, NaN neither.
FUSEDSTEP_HD bool exceeds(double norm, double skip_norm) {
  return !(norm <= skip_norm) && skip_norm != HUGE_VAL;
}

}  // namespace fusedstep
