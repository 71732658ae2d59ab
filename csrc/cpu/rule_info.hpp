#pragma once
#include <vector>

#include "rules/rules.hpp"

namespace fusedstep::cpu {

/// A rule's metadata, read off its type.
struct RuleInfo {
  const char* name;
  std::vector<const char*> slots, hypers, coefficients;
};

/// In the order of the rule list.
const std::vector<RuleInfo>& rule_infos();

}  // namespace fusedstep::cpu
