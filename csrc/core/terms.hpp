#pragma once
#include "core/hd.hpp"

namespace fusedstep {

/// A coefficient of a formula, rounded once to the arithmetic type `T`.
///
/// A zero coefficient removes its term: a form that does not use a term must not turn an infinite
/// state into NaN by multiplying it with zero, and must not cost anything. `used` is the same for
/// all elements of a row, so the branch on it is uniform (a CUDA warp never diverges on it).
template <class T>
struct Term {
  T value;
  bool used;
  Term() = default;
  FUSEDSTEP_HD explicit Term(double coefficient)
      : value(static_cast<T>(coefficient)), used(coefficient != 0) {}
};

/// y + a*x in one rounding; y where a is zero.
template <class V, class T>
FUSEDSTEP_HD V add_scaled(Term<T> a, V x, V y) {
  return a.used ? fma(V(a.value), x, y) : y;
}

/// a*x + b*y: b*y is rounded, then one fused multiply-add. Zero coefficients remove their terms.
template <class V, class T>
FUSEDSTEP_HD V combine(Term<T> a, V x, Term<T> b, V y) {
  if (a.used && b.used) return fma(V(a.value), x, V(b.value) * y);
  if (a.used) return V(a.value) * x;
  return b.used ? V(b.value) * y : V(T(0));
}

}  // namespace fusedstep
