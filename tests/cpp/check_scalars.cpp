// Checks of what is computed once per row in double: powers, NAdam's momenta and their product.
// Prints "N passed, M failed"; the exit status is 1 if M > 0.

#include <random>

#include "checks.hpp"
#include "core/powers.hpp"
#include "cpu/rule_info.hpp"

namespace {

using namespace checks;

double relative_error(double got, long double right) {
  return static_cast<double>(std::fabs((static_cast<long double>(got) - right) / right));
}

// --- powers -----------------------------------------------------------------------------------

void check_exp() {
  double worst = 0, worst_subnormal = 0;
  const auto add = [&](double x) {
    const long double right = std::exp(static_cast<long double>(x));
    const double got = exp_of_negative(x);
    if (right >= 0x1p-1022L) {
      worst = std::max(worst, relative_error(got, right));
    } else {
      const auto error = static_cast<double>(std::fabs(static_cast<long double>(got) - right));
      worst_subnormal = std::max(worst_subnormal, error);
    }
  };
  for (int i = 0; i <= 746 * 256; ++i) add(-i / 256.0);
  for (int exponent = -1; exponent > -80; --exponent) add(-std::ldexp(1.0, exponent));
  std::uniform_real_distribution<double> uniform(-746.0, 0.0);
  for (int i = 0; i < 20000; ++i) add(uniform(generator));
  check(worst < 1e-15, "exp_of_negative: relative error " + std::to_string(worst * 1e15) + "e-15");
  check(worst_subnormal <= 0x1p-1074, "exp_of_negative: subnormal results");
  check(exp_of_negative(0.0) == 1.0 && exp_of_negative(-0.0) == 1.0, "e^0");
  check(exp_of_negative(-746.0) == 0.0 && exp_of_negative(-1e300) == 0.0 &&
            exp_of_negative(-HUGE_VAL) == 0.0,
        "exp_of_negative underflows to 0");
  check(std::isnan(exp_of_negative(NAN)), "exp_of_negative of NaN");
}

void check_power() {
  for (double base : {0.0, 1e-3, 0.1, 0.5, 0.9, 0.96, 0.999, 0.99999, 1.0}) {
    for (std::int64_t n : {0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 100, 255, 1000, 12345, 1000000}) {
      const long double right = std::pow(static_cast<long double>(base), n);
      if (right != 0 && right < 0x1p-1022L) continue;
      const double got = power(base, n), bound = static_cast<double>(n) * 0x1p-53;
      check(right == 0 ? got == 0 : relative_error(got, right) <= bound,
            "power " + std::to_string(base) + "^" + std::to_string(n));
    }
    check(power(base, std::int64_t{1} << 40) == (base == 1.0 ? 1.0 : 0.0), "a long run");
  }
}

// --- NAdam ------------------------------------------------------------------------------------

/// Its coefficients by the formula of the paper, in long double, with the product taken along.
void check_nadam(double beta1, double next_beta1, double beta2, double psi) {
  const auto mu = [&](int t, double beta) {
    return beta * (1 - 0.5L * std::pow(0.96L, static_cast<long double>(t) * psi));
  };
  Row row{};
  const double hyper[] = {0.002, beta1, next_beta1, beta2, 1e-8, psi, 0.0, 0.0};
  row.rule = 2;
  std::copy(std::begin(hyper), std::end(hyper), row.hyper);
  long double product = 1;
  double worst = 0;
  for (int t = 1; t <= 2000; ++t) {
    double k[max_coefficients];
    row.progress.step = t;
    NAdam::prepare(hyper_of<NAdam>(row), row.progress, k);
    row.progress.product = cpu::product_after(row);
    product *= mu(t, beta1);
    const long double next = mu(t + 1, next_beta1);
    const long double right[] = {(1 - mu(t, beta1)) / (1 - product), next / (1 - product * next),
                                 1 / std::sqrt(1 - std::pow(static_cast<long double>(beta2), t))};
    for (int i = 0; i < 3; ++i) worst = std::max(worst, relative_error(k[5 + i], right[i]));
    if (product > 1e-300L)
      worst = std::max(worst, relative_error(row.progress.product, product) / t);
  }
  check(worst < 1e-13, "NAdam's coefficients: relative error " + std::to_string(worst * 1e13) +
                           "e-13 at psi " + std::to_string(psi));
}

/// A rule without a product leaves it as it is.
void check_products() {
  for (int rule = 0; rule < Rules::size; ++rule) {
    Row row{};
    row.rule = rule;
    row.progress = {3, false, 0.625};
    row.hyper[1] = 0.5;
    const bool has_product = cpu::rule_infos()[static_cast<std::size_t>(rule)].scalars.size() == 2;
    check(cpu::product_after(row) == (has_product ? 0.625 * 0.25 : 0.625),
          std::string("the product of ") + cpu::rule_infos()[static_cast<std::size_t>(rule)].name);
  }
}

// --- all coefficients --------------------------------------------------------------------------

/// An average has the weights of the formula, and gets there by the smaller one alone.
void check_averages() {
  for (double beta : {0.0, 0.1, 0.4999, 0.5, 0.9, 0.999, 0.99999, std::nextafter(1.0, 0.0)}) {
    double k[2];
    prepare_average(beta, k);
    const Term<double> c(k[0]), b(k[1]);
    check(c.used + b.used == (beta > 0), "one weight of an average");
    const double got = average(c, b, 3.0, -5.0), right = beta * -5.0 + (1 - beta) * 3.0;
    check(std::fabs(got - right) < 1e-14, "an average with beta " + std::to_string(beta));
  }
}

template <class Rule>
void check_prepare(const std::vector<double>& hyper, const Progress& at,
                   const std::vector<long double>& right) {
  Row row{};
  std::copy(hyper.begin(), hyper.end(), row.hyper);
  double k[max_coefficients] = {};
  Rule::prepare(hyper_of<Rule>(row), at, k);
  for (std::size_t i = 0; i < right.size(); ++i)
    check(k[i] == 0 ? right[i] == 0 : relative_error(k[i], right[i]) < 1e-14,
          std::string("prepare of ") + Rule::name + ": " + Rule::coefficients[i]);
}

/// With betas on both sides of one half, and both kinds of decay.
void check_coefficients() {
  constexpr double lr = 0.125, eps = 1e-8, wd = 0.375, b1 = 0.75, b2 = 0.25;
  constexpr long double one = 1;
  const Progress at{3, false, 0.5};
  const long double first = 1 - one * b1 * b1 * b1, second = 1 - one * b2 * b2 * b2;
  const long double root = 1 / std::sqrt(second);
  for (double decoupled : {0.0, 1.0}) {
    const long double coupled = decoupled != 0 ? 0 : wd, D = decoupled != 0 ? lr * wd : 0;
    check_prepare<Adam>({lr, b1, b2, eps, wd, decoupled}, at,
                        {coupled, 1 - b1, 0, 0, b2, root, -lr / first, eps, D});
    // psi = 0: mu_t = b1 / 2
    const long double mu = one * b1 / 2;
    check_prepare<NAdam>({lr, b1, b1, b2, eps, 0.0, wd, decoupled}, at,
                         {coupled, 1 - b1, 0, 0, b2, (1 - mu) / (1 - mu / 2),
                          mu / (1 - mu * mu / 2), root, -lr, eps, D});
    check_prepare<RmspropCenteredMomentum>({lr, b2, eps, 0.5, 0.625, 0.0, wd, decoupled, 0.0}, at,
                                           {coupled, 0, b2, 0.5, 1, 0, -lr, eps, D, 0});
    check_prepare<RmspropCenteredMomentum>({lr, b1, eps, 0.5, 0.625, 1.0, wd, decoupled, 1.0}, at,
                                           {coupled, 1 - b1, 0, 0.5, 0.625, 1, -lr, 0, D, eps});
  }
  check_prepare<Accumulate>({0.5, 0.25}, at, {0.5, 0.25});
}

}  // namespace

int main() {
  check_exp();
  check_power();
  for (double psi : {0.0, 0.004, 0.1, 3.0}) {
    check_nadam(0.9, 0.9, 0.999, psi);
    check_nadam(0.99, 0.7, 0.9999999, psi);
    check_nadam(0.3, 0.4, 0.2, psi);
  }
  check_products();
  check_averages();
  check_coefficients();
  return report();
}
