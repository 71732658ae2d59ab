#include "cpu/rule_info.hpp"

#include <iterator>
#include <type_traits>

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
  return {{All::name, names(All::slots), names(All::hypers), names(All::coefficients)}...};
}

}  // namespace

const std::vector<RuleInfo>& rule_infos() {
  static const std::vector<RuleInfo> infos = infos_of(Rules{});
  return infos;
}

}  // namespace fusedstep::cpu
