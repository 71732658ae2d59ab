#pragma once
#include <string>

/// Parallel regions: on the OpenMP runtime that is already in the process, since two sets of
/// workers starve each other; else on the system's; else, and in forked children, on threads of our
/// own.
///
/// The environment variable FUSEDSTEP_THREADS_RUNTIME forces one: `openmp` or `own` (default
/// `auto`). It is read once. run_region, get_num_threads and thread_runtime throw
/// std::runtime_error if its value is unknown or what it asks for is not to be had here.
namespace fusedstep::cpu {

/// Runs `body(context, worker)` on up to `threads` threads at once, the caller being worker 0, and
/// returns when all that started have returned. Fewer threads than asked may take part (nested
/// regions, a busy pool, a refused thread), and late: the body must share out its work itself, so
/// that the caller alone would finish it. `body` must not throw. At most 256 threads.
using RegionBody = void (*)(void* context, int worker);
void run_region(int threads, RegionBody body, void* context);

/// Threads a step may use, 1 to 256: what `set_num_threads` said, else what the OpenMP runtime in
/// the process says (torch.set_num_threads, which holds for the thread it was called from), else
/// OMP_NUM_THREADS, else the CPUs this process may run on. Loads and starts nothing; some 20 ns.
int get_num_threads();
/// 0 returns to the default. Throws std::invalid_argument if negative.
void set_num_threads(int threads);

/// What runs parallel regions now: "openmp: <path of the library>", or "own threads (<reason>)":
/// FUSEDSTEP_THREADS_RUNTIME=own, forked child, forked process with an inherited OpenMP runtime, no
/// OpenMP runtime found. May load the system's OpenMP runtime, as the first region would.
std::string thread_runtime();

}  // namespace fusedstep::cpu
