#pragma once
#include "core/terms.hpp"
#include "core/types.hpp"

namespace fusedstep {

/// Gradient accumulation: the "parameter" is the buffer that gathers gradients.
///
///   p <- fma(B, g, A*p)
///
/// A*p is rounded first. A = 0 begins anew, whatever the buffer holds.
struct Accumulate {
  static constexpr const char* name = "accumulate";
  static constexpr const char* const* slots = nullptr;
  static constexpr const char* const* scalars = nullptr;
  static constexpr const char* hypers[] = {"keep", "scale"};
  static constexpr const char* coefficients[] = {"A", "B"};
  static constexpr int optional_terms[] = {0};  // A: the first of several
  static constexpr const int* rare_terms = nullptr;

  struct Hyper {
    double keep, scale;
  };

  FUSEDSTEP_HD static void prepare(const Hyper& h, const Progress& /*at*/, double* k) {
    k[0] = h.keep;
    k[1] = h.scale;
  }

  template <class T>
  struct Coefficients {
    Term<T> A, B;
    template <class Source>  // const double*, or KnownTerms of it
    FUSEDSTEP_HD explicit Coefficients(const Source& k) : A(k[0]), B(k[1]) {}
  };

  template <class V, class T>
  FUSEDSTEP_HD static void apply(const Coefficients<T>& k, V& p, V g, V* /*slot*/) {
    p = combine(k.B, g, k.A, p);
  }
};

}  // namespace fusedstep
