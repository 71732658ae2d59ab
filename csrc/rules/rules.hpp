#pragma once
#include "core/types.hpp"
#include "rules/accumulate.hpp"
#include "rules/adam.hpp"
#include "rules/momentum.hpp"
#include "rules/nadam.hpp"
#include "rules/rmsprop.hpp"
#include "rules/sgd.hpp"

namespace fusedstep {

/// The registration: the only list of rules in the repository.
using Rules = RuleList<Sgd, Momentum, NAdam, Adam, AdamAmsgrad, Rmsprop, RmspropCentered,
                       RmspropMomentum, RmspropCenteredMomentum, Accumulate>;

}  // namespace fusedstep
