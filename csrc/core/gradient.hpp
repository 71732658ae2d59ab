#pragma once
#include "core/hd.hpp"
#include "core/step.hpp"

/// What happens to a gradient before any rule sees it, the same for all rules:
///
///   g <- clamp(c*g, +-clip_value)        c = sign * rescale_grad * min(1, clip_norm / norm)
namespace fusedstep {

/// The norm clip, without epsilon. A NaN norm gives NaN, but under an infinite `clip_norm`, which
/// only measures.
FUSEDSTEP_HD double clip_coefficient(double clip_norm, double norm) {
  const bool inactive = norm <= clip_norm || clip_norm == HUGE_VAL;
  return inactive ? 1.0 : clip_norm / norm;
}

/// The smaller one; NaN wins.
FUSEDSTEP_HD double smaller_coefficient(double a, double b) { return a != a || a <= b ? a : b; }

/// The constants of one row, in double as prepared or rounded once to the arithmetic type. A scale
/// of 1 and an infinite limit would change nothing, so they are skipped; as in core/terms.hpp it is
/// the same for all elements of a row.
template <class T>
struct Conditioning {
  T scale, limit;
  bool scales, limits;
};

FUSEDSTEP_HD Conditioning<double> conditioning_of(double sign, double rescale_grad, double clip,
                                                  double clip_value) {
  const double scale = sign * rescale_grad * clip;
  return {scale, clip_value, scale != 1, clip_value != HUGE_VAL};
}

/// `norm` is after rescale_grad.
FUSEDSTEP_HD Conditioning<double> prepare_gradient(const Row& row, double norm) {
  const double clip = clip_coefficient(row.clip_norm, norm);
  return conditioning_of(row.sign, row.rescale_grad, clip, row.clip_value);
}

template <class V, class T>
FUSEDSTEP_HD V condition(const Conditioning<T>& k, V g) {
  if (k.scales) g = V(k.scale) * g;
  return k.limits ? clamp(g, V(k.limit)) : g;
}

}  // namespace fusedstep
