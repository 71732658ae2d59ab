#pragma once
#include "core/powers.hpp"
#include "core/terms.hpp"
#include "core/types.hpp"

namespace fusedstep {

/// Adam with Nesterov momentum that warms up.
///
///   g <- fma(wd, p, g)
///   m <- average(g, m)                          weights 1 - beta1, beta1
///   s <- average(g*g, s)                        weights 1 - beta2, beta2
///   u <- fma(M, m, G*g)                         G = (1 - mu_t) / (1 - prod mu_1..mu_t)
///                                               M = mu_{t+1} / (1 - prod mu_1..mu_{t+1})
///   d <- fma(R, sqrt(s), eps)                   R = 1 / sqrt(1 - beta2^t)
///   p <- fma(S, u/d, fma(-D, p, p))             S = -lr, D = lr*wd decoupled, else 0
///
/// mu_t = beta1 (1 - 0.96^(t psi) / 2) with psi = momentum_decay; mu_{t+1} with the beta1 of the
/// coming step. G*g is rounded first.
/// Sources: Dozat 2016, algorithm 2 and its section on momentum schedules; torch.optim.NAdam.
struct NAdam {
  static constexpr const char* name = "nadam";
  static constexpr const char* slots[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* scalars[] = {"step", "mu_product"};
  static constexpr const char* hypers[] = {
      "lr",  "beta1",          "next_beta1",   "beta2",
      "eps", "momentum_decay", "weight_decay", "decoupled_weight_decay"};
  static constexpr const char* coefficients[] = {"wd", "c1", "b1", "c2",  "b2", "G",
                                                 "M",  "R",  "S",  "eps", "D"};
  /// Coefficients (by index) that an ordinary form may lack: wd, D; that it does lack: b1, b2.
  static constexpr int optional_terms[] = {0, 10};
  static constexpr int rare_terms[] = {2, 4};

  struct Hyper {
    double lr, beta1, next_beta1, beta2, eps, momentum_decay, weight_decay, decoupled_weight_decay;
  };

  /// mu_t, whose product over all steps the state keeps.
  FUSEDSTEP_HD static double factor(const Hyper& h, std::int64_t t) { return mu(h.beta1, h, t); }

  FUSEDSTEP_HD static double mu(double beta1, const Hyper& h, std::int64_t t) {
    constexpr double log_of_0_96 = -0x1.4e69ed6d80eb3p-5;
    const double decayed = exp_of_negative(static_cast<double>(t) * h.momentum_decay * log_of_0_96);
    return beta1 * (1.0 - 0.5 * decayed);
  }

  FUSEDSTEP_HD static void prepare(const Hyper& h, const Progress& at, double* k) {
    const double mu_t = factor(h, at.step), next_mu = mu(h.next_beta1, h, at.step + 1);
    const double product = at.product * mu_t;
    k[0] = h.decoupled_weight_decay != 0 ? 0.0 : h.weight_decay;
    prepare_average(h.beta1, k + 1);
    prepare_average(h.beta2, k + 3);
    k[5] = (1.0 - mu_t) / (1.0 - product);
    k[6] = next_mu / (1.0 - product * next_mu);
    k[7] = 1.0 / sqrt(one_minus_power(h.beta2, at.step));
    k[8] = -h.lr;
    k[9] = h.eps;
    k[10] = h.decoupled_weight_decay != 0 ? h.lr * h.weight_decay : 0.0;
  }

  template <class T>
  struct Coefficients {
    Term<T> wd, c1, b1, c2, b2, G, M, R, S, eps, minus_D;
    template <class Source>  // const double*, or KnownTerms of it
    FUSEDSTEP_HD explicit Coefficients(const Source& k)
        : wd(k[0]),
          c1(k[1]),
          b1(k[2]),
          c2(k[3]),
          b2(k[4]),
          G(k[5]),
          M(k[6]),
          R(k[7]),
          S(k[8]),
          eps(k[9]),
          minus_D(-k[10]) {}
  };

  template <class V, class T>
  FUSEDSTEP_HD static void apply(const Coefficients<T>& k, V& p, V g, V* slot) {
    V &m = slot[0], &s = slot[1];
    g = add_scaled(k.wd, p, g);
    m = average(k.c1, k.b1, g, m);
    s = average(k.c2, k.b2, g * g, s);
    const V u = combine(k.M, m, k.G, g);
    const V d = fma(V(k.R.value), sqrt(s), V(k.eps.value));
    p = add_scaled(k.S, u / d, add_scaled(k.minus_D, p, p));
  }
};

}  // namespace fusedstep
