#include "cpu/threads.hpp"

#if !defined(__linux__)
#error "fusedstep's threads need Linux (futex, dl_iterate_phdr)"
#endif

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "cpu/openmp.hpp"
#include "cpu/placement.hpp"
#include "cpu/pool.hpp"

namespace fusedstep::cpu {
namespace {

// Bounds what a typing error can do; a step is limited by memory bandwidth long before.
constexpr int most_threads = 256;

// --- the child of a fork -----------------------------------------------------------------------
// It has the parent's OpenMP runtime but none of its threads: libgomp would wait for them for ever.

bool forked_without_exec() {
  char text[512] = {};
  std::FILE* file = std::fopen("/proc/self/stat", "re");
  if (!file) return false;
  const std::size_t size = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  text[size] = '\0';
  const char* name_end = std::strrchr(text, ')');  // the name may hold blanks and parentheses
  unsigned flags = 0;
  if (!name_end || std::sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1)
    return false;
  constexpr unsigned pf_forknoexec = 0x40;  // linux/sched.h
  return flags & pf_forknoexec;
}

std::atomic<bool> forked{false};
// This module was loaded in a forked process with an OpenMP runtime, used before the fork or not.
const bool runtime_inherited = forked_without_exec() && find_openmp(false) != nullptr;

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  forked.store(true, std::memory_order_relaxed);
  reset_openmp_lock();
  reset_pool();
});

// --- which runtime -----------------------------------------------------------------------------

enum class Choice { automatic, openmp, own, unknown };

std::string choice_variable() {
  const char* value = std::getenv("FUSEDSTEP_THREADS_RUNTIME");
  return value ? value : "";
}

Choice read_choice() {
  const std::string text = choice_variable();
  if (text.empty() || text == "auto") return Choice::automatic;
  if (text == "openmp") return Choice::openmp;
  if (text == "own") return Choice::own;
  return Choice::unknown;
}

Choice requested_runtime() {
  static const Choice choice = read_choice();
  if (choice == Choice::unknown)
    throw std::runtime_error("FUSEDSTEP_THREADS_RUNTIME: expected auto, openmp or own, got '" +
                             choice_variable() + "'");
  return choice;
}

const OpenMP* required_openmp() {
  if (forked.load(std::memory_order_relaxed))
    throw std::runtime_error(
        "FUSEDSTEP_THREADS_RUNTIME=openmp: impossible in a forked child, whose OpenMP runtime has "
        "lost its threads; start the process by 'spawn', or unset the variable");
  if (const OpenMP* openmp = find_openmp(true)) return openmp;
  throw std::runtime_error("FUSEDSTEP_THREADS_RUNTIME=openmp: no OpenMP runtime found (" +
                           openmp_open_error() + ")");
}

/// Null: our own threads.
const OpenMP* region_runtime() {
  switch (requested_runtime()) {
    case Choice::own: return nullptr;
    case Choice::openmp: return required_openmp();
    default: break;
  }
  if (forked.load(std::memory_order_relaxed) || runtime_inherited) return nullptr;
  return find_openmp(true);
}

// --- regions and counts ------------------------------------------------------------------------

struct OpenMPRegion {
  const OpenMP* openmp;
  RegionBody body;
  void* context;
  int threads;
  int caller_cpu;
  std::atomic<int> arrived{0};  // workers besides the caller
};

void run_as_caller(OpenMPRegion& region) {
  // Workers that still spin after the last region arrive within a microsecond.
  constexpr int spins = 60;
  const int others = region.openmp->num_threads() - 1;
  const auto arrived = [&] { return region.arrived.load(std::memory_order_relaxed); };
  for (int i = 0; i < spins && others > 0 && arrived() == 0; ++i) relax_cpu();
  if (others > 0 && arrived() == 0) offer_cpu();
  region.body(region.context, 0);
  while (arrived() < others) sched_yield();  // libgomp would spin, perhaps in front of a worker
}

void run_as_worker(OpenMPRegion& region, int worker) {
  region.arrived.fetch_add(1, std::memory_order_relaxed);
  leave_cpu(region.caller_cpu);
  if (worker < region.threads) region.body(region.context, worker);
}

void run_on_openmp(const OpenMP& openmp, int threads, RegionBody body, void* context) {
  if (openmp.in_parallel()) return body(context, 0);
  OpenMPRegion shared{&openmp, body, context, threads, current_cpu()};
  const auto run = [](void* argument) {
    auto& region = *static_cast<OpenMPRegion*>(argument);
    const int worker = region.openmp->thread_num();
    worker == 0 ? run_as_caller(region) : run_as_worker(region, worker);
  };
  // The whole team is started even if fewer threads are wanted: libgomp ends the threads that a
  // smaller team leaves over, and creates them again for the framework's next region.
  const int team = std::max(threads, openmp.max_threads());
  openmp.parallel(run, &shared, static_cast<unsigned>(team), 0);
}

int omp_num_threads_variable() {
  const char* value = std::getenv("OMP_NUM_THREADS");  // "4", or "4,2" for nested regions
  const long count = value ? std::strtol(value, nullptr, 10) : 0;
  return static_cast<int>(std::clamp(count, 0L, long{most_threads}));
}

int usable_cpus() {
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return CPU_COUNT(&cpus);
  return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));  // more CPUs than a cpu_set_t can name
}

int default_num_threads() {
  // Also if regions run elsewhere (own threads, a forked child): torch.set_num_threads(1), as its
  // data loader does in workers, means us too. Reading the setting starts nothing.
  if (const OpenMP* openmp = find_openmp(false)) return openmp->max_threads();
  if (const int count = omp_num_threads_variable()) return count;
  return usable_cpus();
}

std::atomic<int> chosen_num_threads{0};  // 0: the default

}  // namespace

void run_region(int threads, RegionBody body, void* context) {
  threads = std::min(threads, most_threads);
  if (threads <= 1) return body(context, 0);
  if (const OpenMP* openmp = region_runtime()) {
    run_on_openmp(*openmp, threads, body, context);
  } else {
    run_on_pool(threads, body, context);
  }
}

int get_num_threads() {
  requested_runtime();  // complains about a bad value before the first step, not within it
  const int chosen = chosen_num_threads.load(std::memory_order_relaxed);
  return std::clamp(chosen > 0 ? chosen : default_num_threads(), 1, most_threads);
}

void set_num_threads(int threads) {
  if (threads < 0)
    throw std::invalid_argument("threads: expected >= 1, or 0 for the default, got " +
                                std::to_string(threads));
  chosen_num_threads.store(threads, std::memory_order_relaxed);
}

std::string thread_runtime() {
  if (const OpenMP* openmp = region_runtime()) return "openmp: " + openmp->path;
  if (requested_runtime() == Choice::own) return "own threads (FUSEDSTEP_THREADS_RUNTIME=own)";
  if (forked.load(std::memory_order_relaxed)) return "own threads (forked child)";
  if (runtime_inherited) return "own threads (forked process with an inherited OpenMP runtime)";
  return "own threads (no OpenMP runtime found)";
}

}  // namespace fusedstep::cpu
