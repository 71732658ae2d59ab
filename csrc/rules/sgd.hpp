#pragma once
#include "core/terms.hpp"
#include "core/types.hpp"

namespace fusedstep {

/// Plain stochastic gradient descent, without state.
///
///   g <- fma(wd, p, g)
///   p <- fma(-lr, g, fma(-D, p, p))        D = lr*wd decoupled, else 0
///
/// Source: Robbins and Monro 1951; the bits of torch.optim.SGD(momentum=0).
struct Sgd {
  static constexpr const char* name = "sgd";
  static constexpr const char* const* slots = nullptr;
  static constexpr const char* const* scalars = nullptr;
  static constexpr const char* hypers[] = {"lr", "weight_decay", "decoupled_weight_decay"};
  static constexpr const char* coefficients[] = {"wd", "S", "D"};
  /// Coefficients (by index) that an ordinary form may lack: wd, D.
  static constexpr int optional_terms[] = {0, 2};
  static constexpr const int* rare_terms = nullptr;

  struct Hyper {
    double lr, weight_decay, decoupled_weight_decay;
  };

  FUSEDSTEP_HD static void prepare(const Hyper& h, const Progress& /*at*/, double* k) {
    k[0] = h.decoupled_weight_decay != 0 ? 0.0 : h.weight_decay;
    k[1] = -h.lr;
    k[2] = h.decoupled_weight_decay != 0 ? h.lr * h.weight_decay : 0.0;
  }

  template <class T>
  struct Coefficients {
    Term<T> wd, S, minus_D;
    template <class Source>  // const double*, or KnownTerms of it
    FUSEDSTEP_HD explicit Coefficients(const Source& k) : wd(k[0]), S(k[1]), minus_D(-k[2]) {}
  };

  template <class V, class T>
  FUSEDSTEP_HD static void apply(const Coefficients<T>& k, V& p, V g, V* /*slot*/) {
    g = add_scaled(k.wd, p, g);
    p = add_scaled(k.S, g, add_scaled(k.minus_D, p, p));
  }
};

}  // namespace fusedstep
