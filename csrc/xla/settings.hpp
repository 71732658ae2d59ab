#pragma once
#include <cmath>

#include "xla/common.hpp"

namespace fusedstep::xla {

/// The hyper-parameters of a step, in the order in which Python lists them.
struct Settings {
  double rescale_grad, sign, clip_norm, clip_value, skip_norm;
  double hyper[max_hypers];
};
constexpr std::size_t num_settings = sizeof(Settings) / sizeof(double);

/// What `settle` tells every `update` of a step. As doubles, followed by the norms of the
/// gradients before `rescale_grad`: one, or with `per_array` one for each leaf of the tree; NaN if
/// nothing asked for them.
struct Settled {
  double skip;  ///< not 0: leave everything as it was
  double norm_known;
  Settings settings;
};
constexpr std::size_t num_settled = sizeof(Settled) / sizeof(double);

inline Row row_of(int rule, const Settings& settings) {
  Row row{};
  row.rule = rule;
  row.progress = {1, false, 1.0};
  row.rescale_grad = settings.rescale_grad;
  row.sign = settings.sign;
  row.clip_norm = settings.clip_norm;
  row.clip_value = settings.clip_value;
  std::memcpy(row.hyper, settings.hyper, sizeof row.hyper);
  return row;
}

/// How far each leaf of the tree has come: steps applied, and the running product so far of a rule
/// that has one.
struct Counts {
  const std::int32_t* steps;
  Words products;  ///< empty for a rule without

  Progress next(std::size_t leaf) const {
    const std::int32_t done = steps[leaf];
    return {std::int64_t{done} + 1, done == 0, has_products() ? double_at(products, leaf) : 1.0};
  }
  bool has_products() const { return num_doubles(products) > 0; }
};

inline bool operator==(const Progress& a, const Progress& b) {
  return a.step == b.step && a.first == b.first && a.product == b.product;
}

}  // namespace fusedstep::xla
