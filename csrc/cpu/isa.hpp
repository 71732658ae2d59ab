#pragma once
#include <string>
#include <vector>

namespace fusedstep::cpu {

/// Instruction sets that this build has kernels for and this machine can run, best first.
std::vector<std::string> available_isas();

/// The one in use: the best available, or what FUSEDSTEP_FORCE_ISA or `force_isa` asked for.
/// Throws std::runtime_error if that one is unknown or missing here.
const char* active_isa();

/// Forces an instruction set by name from now on; the empty string returns to the default choice.
/// Throws std::runtime_error if it is unknown or missing here. Meant for tests and benchmarks.
void force_isa(const std::string& name);

}  // namespace fusedstep::cpu
