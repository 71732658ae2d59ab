#include "cpu/rule_info.hpp"

#include <iterator>
#include <type_traits>

#include "core/float_env.hpp"

namespace fusedstep::cpu {

namespace {

/// A rule without any writes nullptr instead of an array.
template <class Array>
std::vector<const char*> names(const Array& array) {
  if constexpr (std::is_array_v<Array>) {
    return {std::begin(array), std::end(array)};
  } else {
    return {};
  }
}

template <class... All>
std::vector<RuleInfo> infos_of(RuleList<All...>) {
  return {{All::name, names(All::slots), names(All::scalars), names(All::hypers),
           names(All::coefficients)}...};
}

template <class Rule>
double product_of(const Row& row) {
  static_assert(length_of<decltype(Rule::scalars)> <= max_scalars);
  return fusedstep::product_after<Rule>(hyper_of<Rule>(row), row.progress);
}

template <class... All>
double product_of(RuleList<All...> /*rules*/, const Row& row) {
  static constexpr double (*products[])(const Row&) = {product_of<All>...};
  return products[row.rule](row);
}

}  // namespace

double product_after(const Row& row) {
  const FloatEnvironment environment;
  return product_of(Rules{}, row);
}

const std::vector<RuleInfo>& rule_infos() {
  static const std::vector<RuleInfo> infos = infos_of(Rules{});
  return infos;
}

}  // namespace fusedstep::cpu
