#pragma once
#include "core/types.hpp"
#include "rules/momentum.hpp"
#include "rules/sgd.hpp"

namespace fusedstep {

/// The registration: the only list of rules in the repository.
using Rules = RuleList<Sgd, Momentum>;

}  // namespace fusedstep
