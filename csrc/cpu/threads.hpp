#pragma once
#include <string>

/// Parallel regions, on the OpenMP runtime that is already in the process if there is one.
namespace fusedstep::cpu {

/// Runs `body(context, worker)` on up to `threads` threads at once, the caller being worker 0, and
/// returns when all that started have returned. Fewer threads than asked may take part (nested
/// regions, a busy pool, a forked child): the body must share out its work itself, so that the
/// caller alone would finish it. `body` must not throw.
using RegionBody = void (*)(void* context, int worker);
void run_region(int threads, RegionBody body, void* context);

/// Threads a step may use: what `set_num_threads` said, else what the OpenMP runtime in the process
/// says (torch.set_num_threads, OMP_NUM_THREADS), else the CPUs this process may run on.
int get_num_threads();
/// 0 returns to the default.
void set_num_threads(int threads);

/// What runs parallel regions now: "openmp: <path of the library>", or "own threads", with the
/// reason ("no OpenMP runtime found", "forked child").
std::string thread_runtime();

}  // namespace fusedstep::cpu
