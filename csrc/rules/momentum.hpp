#pragma once
#include "core/terms.hpp"
#include "core/types.hpp"

namespace fusedstep {

/// Every one-buffer momentum convention, by coefficients: heavy ball and Nesterov, learning rate
/// outside the velocity (PyTorch, braintools) or inside it (Keras, MXNet), dampening and unit gain,
/// coupled and decoupled decay, momentum that changes from step to step, FISTA.
///
///   g <- fma(wd, p, g)
///   v <- fma(B, g, A*v)
///   d <- fma(N1, v, N2*g)
///   p <- fma(S, d, fma(-D, p, p))
///
/// A*v and N2*g are rounded first. A zero coefficient removes its term.
/// Sources: Polyak 1964; Nesterov 1983; Sutskever et al. 2013, eq. 3-4. With A = mu, B = 1,
/// N1 = mu, N2 = 1, S = -lr these are the bits of torch.optim.SGD (for-loop and foreach, float32).
struct Momentum {
  static constexpr const char* name = "momentum";
  static constexpr const char* slots[] = {"velocity"};
  static constexpr const char* const* scalars = nullptr;
  static constexpr const char* hypers[] = {
      "lr",       "momentum",       "next_momentum",          "dampening",        "weight_decay",
      "nesterov", "lr_in_velocity", "decoupled_weight_decay", "dampen_first_step"};
  static constexpr const char* coefficients[] = {"wd", "A", "B", "N1", "N2", "S", "D"};
  /// Coefficients (by index) that an ordinary form may lack: wd, N2, D.
  static constexpr int optional_terms[] = {0, 4, 6};
  static constexpr const int* rare_terms = nullptr;

  /// Flags are 0 or 1.
  struct Hyper {
    double lr, momentum, next_momentum, dampening, weight_decay;
    double nesterov, lr_in_velocity, decoupled_weight_decay, dampen_first_step;
  };

  FUSEDSTEP_HD static void prepare(const Hyper& h, const Progress& at, double* k) {
    const bool undamped = at.first && h.dampen_first_step == 0;
    const double gain = undamped ? 1.0 : 1.0 - h.dampening;
    const double grad_weight = h.lr_in_velocity != 0 ? -h.lr * gain : gain;
    k[0] = h.decoupled_weight_decay != 0 ? 0.0 : h.weight_decay;
    k[1] = at.first ? 0.0 : h.momentum;
    k[2] = grad_weight;
    k[3] = h.nesterov != 0 ? h.next_momentum : 1.0;
    k[4] = h.nesterov != 0 ? grad_weight : 0.0;
    k[5] = h.lr_in_velocity != 0 ? 1.0 : -h.lr;
    k[6] = h.decoupled_weight_decay != 0 ? h.lr * h.weight_decay : 0.0;
  }

  template <class T>
  struct Coefficients {
    Term<T> wd, A, B, N1, N2, S, minus_D;
    template <class Source>  // const double*, or KnownTerms of it
    FUSEDSTEP_HD explicit Coefficients(const Source& k)
        : wd(k[0]), A(k[1]), B(k[2]), N1(k[3]), N2(k[4]), S(k[5]), minus_D(-k[6]) {}
  };

  template <class V, class T>
  FUSEDSTEP_HD static void apply(const Coefficients<T>& k, V& p, V g, V* slot) {
    V& v = slot[0];
    g = add_scaled(k.wd, p, g);
    v = combine(k.B, g, k.A, v);
    const V d = combine(k.N1, v, k.N2, g);
    p = add_scaled(k.S, d, add_scaled(k.minus_D, p, p));
  }
};

}  // namespace fusedstep
