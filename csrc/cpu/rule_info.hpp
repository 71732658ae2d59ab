#pragma once
#include <vector>

#include "core/step.hpp"
#include "rules/rules.hpp"

namespace fusedstep::cpu {

/// A rule's metadata, read off its type.
struct RuleInfo {
  const char* name;
  std::vector<const char*> slots, scalars, hypers, coefficients;
};

/// In the order of the rule list.
const std::vector<RuleInfo>& rule_infos();

/// The running product of a row's rule after the step that the row describes.
double product_after(const Row& row);

}  // namespace fusedstep::cpu
