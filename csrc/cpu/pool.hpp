#pragma once
#include "cpu/threads.hpp"

/// Our own threads, for a process without an OpenMP runtime and for forked children.
namespace fusedstep::cpu {

/// Like run_region, for threads >= 2. One region at a time: a second caller, also from within a
/// region, runs its body alone. The threads sleep between regions and never end.
void run_on_pool(int threads, RegionBody body, void* context);

/// For the child of a fork, which has none of the parent's threads: start anew.
void reset_pool();

}  // namespace fusedstep::cpu
