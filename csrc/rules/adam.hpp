#pragma once
#include "core/powers.hpp"
#include "core/terms.hpp"
#include "core/types.hpp"

namespace fusedstep {

/// Adam and, with decoupled decay, AdamW.
///
///   g <- fma(wd, p, g)
///   m <- average(g, m)                      weights 1 - beta1, beta1
///   s <- average(g*g, s)                    weights 1 - beta2, beta2
///   d <- fma(R, sqrt(s), eps)               R = 1 / sqrt(1 - beta2^t)
///   p <- fma(S, m/d, fma(-D, p, p))         S = -lr / (1 - beta1^t), D = lr*wd decoupled, else 0
///
/// Sources: Kingma and Ba 2015, algorithm 1, with the correction moved to the scalars as in
/// torch.optim.Adam; Loshchilov and Hutter 2019 (decoupled decay).
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr const char* slots[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* scalars[] = {"step"};
  static constexpr const char* hypers[] = {"lr",  "beta1",        "beta2",
                                           "eps", "weight_decay", "decoupled_weight_decay"};
  static constexpr const char* coefficients[] = {"wd", "c1", "b1",  "c2", "b2",
                                                 "R",  "S",  "eps", "D"};
  /// Coefficients (by index) that an ordinary form may lack: wd, D; that it does lack: b1, b2.
  static constexpr int optional_terms[] = {0, 8};
  static constexpr int rare_terms[] = {2, 4};

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay;
  };

  FUSEDSTEP_HD static void prepare(const Hyper& h, const Progress& at, double* k) {
    k[0] = h.decoupled_weight_decay != 0 ? 0.0 : h.weight_decay;
    prepare_average(h.beta1, k + 1);
    prepare_average(h.beta2, k + 3);
    k[5] = 1.0 / sqrt(one_minus_power(h.beta2, at.step));
    k[6] = -h.lr / one_minus_power(h.beta1, at.step);
    k[7] = h.eps;
    k[8] = h.decoupled_weight_decay != 0 ? h.lr * h.weight_decay : 0.0;
  }

  template <class T>
  struct Coefficients {
    Term<T> wd, c1, b1, c2, b2, R, S, eps, minus_D;
    template <class Source>  // const double*, or KnownTerms of it
    FUSEDSTEP_HD explicit Coefficients(const Source& k)
        : wd(k[0]),
          c1(k[1]),
          b1(k[2]),
          c2(k[3]),
          b2(k[4]),
          R(k[5]),
          S(k[6]),
          eps(k[7]),
          minus_D(-k[8]) {}
  };

  template <class V, class T>
  FUSEDSTEP_HD static void apply(const Coefficients<T>& k, V& p, V g, V* slot) {
    V& s = slot[1];
    update_moments(k, p, g, slot);
    descend(k, p, slot[0], s);
  }

 protected:
  template <class V, class T>
  FUSEDSTEP_HD static void update_moments(const Coefficients<T>& k, V p, V g, V* slot) {
    g = add_scaled(k.wd, p, g);
    slot[0] = average(k.c1, k.b1, g, slot[0]);
    slot[1] = average(k.c2, k.b2, g * g, slot[1]);
  }

  template <class V, class T>
  FUSEDSTEP_HD static void descend(const Coefficients<T>& k, V& p, V m, V s) {
    const V d = fma(V(k.R.value), sqrt(s), V(k.eps.value));
    p = add_scaled(k.S, m / d, add_scaled(k.minus_D, p, p));
  }
};

/// Adam whose denominator never shrinks: the same with x <- max(x, s) in place of s in d.
///
/// Source: Reddi, Kale and Kumar 2018; the maximum is that of the uncorrected averages, as in
/// torch.optim.Adam(amsgrad=True).
struct AdamAmsgrad : Adam {
  static constexpr const char* name = "adam_amsgrad";
  static constexpr const char* slots[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  template <class V, class T>
  FUSEDSTEP_HD static void apply(const Coefficients<T>& k, V& p, V g, V* slot) {
    V &s = slot[1], &x = slot[2];
    update_moments(k, p, g, slot);
    x = larger(x, s);
    descend(k, p, slot[0], x);
  }
};

}  // namespace fusedstep
