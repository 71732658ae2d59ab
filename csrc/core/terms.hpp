#pragma once
#include "core/hd.hpp"

namespace fusedstep {

/// A coefficient of a formula and whether its term exists at all.
struct Coefficient {
  double value;
  bool used;
  FUSEDSTEP_HD Coefficient(double x) : value(x), used(x != 0) {}
  FUSEDSTEP_HD Coefficient(double x, bool known_used) : value(x), used(known_used) {}
  FUSEDSTEP_HD Coefficient operator-() const { return {-value, used}; }
};

/// Coefficients of which the compiler knows the used ones: bit i of `terms`. The element loop has
/// no branch left then.
template <unsigned terms>
struct KnownTerms {
  const double* values;
  FUSEDSTEP_HD Coefficient operator[](int i) const { return {values[i], (terms >> i & 1) != 0}; }
};

/// A coefficient rounded once to the arithmetic type `T`.
///
/// A zero coefficient removes its term: a form that does not use a term must not turn an infinite
/// state into NaN by multiplying it with zero, and must not cost anything. `used` is the same for
/// all elements of a row, so a branch on it is uniform (a CUDA warp never diverges on it).
template <class T>
struct Term {
  T value;
  bool used;
  FUSEDSTEP_HD explicit Term(Coefficient k) : value(static_cast<T>(k.value)), used(k.used) {}
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

/// The weights of an exponential moving average: k[0] of what comes in, k[1] of what was there.
/// Exactly one of them is not zero (none if beta is 0): the smaller one.
FUSEDSTEP_HD void prepare_average(double beta, double* k) {
  k[0] = beta >= 0.5 ? 1.0 - beta : 0.0;
  k[1] = beta >= 0.5 ? 0.0 : beta;
}

/// beta*m + (1 - beta)*x, as a way from the end that is nearer. So nothing cancels, and the weights
/// add up to 1 exactly, whatever beta is rounded to: the average of a constant stays that constant.
/// With 0.99999 in float32 the two weights of b*m + c*x would add up to 1 - 1e-8, which drags it
/// 0.1 % away.
template <class V, class T>
FUSEDSTEP_HD V average(Term<T> weight_of_x, Term<T> weight_of_m, V x, V m) {
  if (weight_of_x.used) return fma(V(weight_of_x.value), x - m, m);
  return weight_of_m.used ? fma(V(weight_of_m.value), m - x, x) : x;
}

}  // namespace fusedstep
