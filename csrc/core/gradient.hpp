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

template <class T>
struct Conditioning {
  T scale, limit;
};

/// `norm` is after rescale_grad. Rounded to the arithmetic type once, by the backend.
FUSEDSTEP_HD Conditioning<double> prepare_gradient(const Row& row, double norm) {
  return {row.sign * row.rescale_grad * clip_coefficient(row.clip_norm, norm), row.clip_value};
}

/// Always multiplies and clamps: with scale 1 and limit infinity both are exact and leave g as is.
template <class V, class T>
FUSEDSTEP_HD V condition(const Conditioning<T>& k, V g) {
  return clamp(V(k.scale) * g, V(k.limit));
}

}  // namespace fusedstep
