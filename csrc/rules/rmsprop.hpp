#pragma once
#include "core/terms.hpp"
#include "core/types.hpp"

namespace fusedstep {

/// RMSprop: gradients divided by a running root mean square. Four rules share the formula, by which
/// state they keep; lines marked (c) belong to the centered ones, (v) to those with momentum.
///
///   g <- fma(wd, p, g)
///   s <- average(g*g, s)                    weights 1 - alpha, alpha
///   a <- average(g, a)                      (c) weights 1 - alpha, alpha
///   s - a*a instead of s in d               (c) not below 0
///   d <- sqrt(s + E) + eps                  E = 0, or eps under the root and 0 beside it
///   u <- g / d
///   v <- fma(A, v, u)                       (v) A = momentum
///   u <- fma(N1, v, N2*u)                   (v) N1 = next momentum, N2 = 1 with Nesterov's form;
///                                               else N1 = 1, N2 = 0
///   p <- fma(S, u, fma(-D, p, p))           S = -lr, D = lr*wd decoupled, else 0
///
/// Rounding can make s - a*a negative; it is a variance, so 0 is taken then (torch gets NaN).
/// Sources: Hinton 2012, lecture 6e; Graves 2013, eq. 38-45 (centered, momentum);
/// torch.optim.RMSprop; eps under the root: TensorFlow, Keras, optax. Momentum in Nesterov's form:
/// Sutskever et al. 2013 on the scaled gradient.
struct RmspropFormula {
  static constexpr const char* const* scalars = nullptr;
  static constexpr const char* hypers[] = {"lr",
                                           "alpha",
                                           "eps",
                                           "momentum",
                                           "next_momentum",
                                           "nesterov",
                                           "weight_decay",
                                           "decoupled_weight_decay",
                                           "eps_in_root"};
  static constexpr const char* coefficients[] = {"wd", "c", "b",   "A", "N1",
                                                 "N2", "S", "eps", "D", "E"};
  /// Coefficients (by index) that an ordinary form may lack: wd, N2, D; that it does lack: b, E.
  static constexpr int optional_terms[] = {0, 5, 8};
  static constexpr int rare_terms[] = {2, 9};

  struct Hyper {
    double lr, alpha, eps, momentum, next_momentum, nesterov, weight_decay, decoupled_weight_decay,
        eps_in_root;
  };

  FUSEDSTEP_HD static void prepare(const Hyper& h, const Progress& /*at*/, double* k) {
    k[0] = h.decoupled_weight_decay != 0 ? 0.0 : h.weight_decay;
    prepare_average(h.alpha, k + 1);
    k[3] = h.momentum;
    k[4] = h.nesterov != 0 ? h.next_momentum : 1.0;
    k[5] = h.nesterov != 0 ? 1.0 : 0.0;
    k[6] = -h.lr;
    k[7] = h.eps_in_root != 0 ? 0.0 : h.eps;
    k[8] = h.decoupled_weight_decay != 0 ? h.lr * h.weight_decay : 0.0;
    k[9] = h.eps_in_root != 0 ? h.eps : 0.0;
  }

  template <class T>
  struct Coefficients {
    Term<T> wd, c, b, A, N1, N2, S, eps, minus_D, E;
    template <class Source>  // const double*, or KnownTerms of it
    FUSEDSTEP_HD explicit Coefficients(const Source& k)
        : wd(k[0]),
          c(k[1]),
          b(k[2]),
          A(k[3]),
          N1(k[4]),
          N2(k[5]),
          S(k[6]),
          eps(k[7]),
          minus_D(-k[8]),
          E(k[9]) {}
  };
};

template <bool centered, bool has_momentum>
struct RmspropForm : RmspropFormula {
  FUSEDSTEP_HD static void prepare(const Hyper& h, const Progress& at, double* k) {
    RmspropFormula::prepare(h, at, k);
    if constexpr (!has_momentum) k[3] = 1.0;  // A is not read, and so never lacking
  }

  template <class V, class T>
  FUSEDSTEP_HD static void apply(const Coefficients<T>& k, V& p, V g, V* slot) {
    V& s = slot[0];
    g = add_scaled(k.wd, p, g);
    s = average(k.c, k.b, g * g, s);
    V variance = s;
    if constexpr (centered) {
      V& a = slot[1];
      a = average(k.c, k.b, g, a);
      variance = larger(V(T(0)), fma(-a, a, s));
    }
    variance = add_scaled(k.E, V(T(1)), variance);
    V u = g / (sqrt(variance) + V(k.eps.value));
    if constexpr (has_momentum) {
      V& v = slot[centered ? 2 : 1];
      v = add_scaled(k.A, v, u);
      u = combine(k.N1, v, k.N2, u);
    }
    p = add_scaled(k.S, u, add_scaled(k.minus_D, p, p));
  }
};

struct Rmsprop : RmspropForm<false, false> {
  static constexpr const char* name = "rmsprop";
  static constexpr const char* slots[] = {"square_avg"};
};

struct RmspropCentered : RmspropForm<true, false> {
  static constexpr const char* name = "rmsprop_centered";
  static constexpr const char* slots[] = {"square_avg", "grad_avg"};
};

struct RmspropMomentum : RmspropForm<false, true> {
  static constexpr const char* name = "rmsprop_momentum";
  static constexpr const char* slots[] = {"square_avg", "momentum_buffer"};
};

struct RmspropCenteredMomentum : RmspropForm<true, true> {
  static constexpr const char* name = "rmsprop_centered_momentum";
  static constexpr const char* slots[] = {"square_avg", "grad_avg", "momentum_buffer"};
};

}  // namespace fusedstep
