#include "cpu/placement.hpp"

#include <sched.h>

#include <atomic>
#include <chrono>

namespace fusedstep::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// A worker that waited here has moved away long before; a busy process keeps the CPU for
// milliseconds. Then there are no offers for a multiple of that time: they take 3 % at most.
constexpr std::chrono::microseconds longest_offer{500};
constexpr int rest_after_loss = 32;

std::atomic<Clock::rep> next_offer{0};

}  // namespace

int current_cpu() { return sched_getcpu(); }

void leave_cpu(int cpu) {
  if (cpu < 0 || sched_getcpu() != cpu) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(static_cast<unsigned>(cpu), &others);
  if (CPU_COUNT(&others) == 0) return;
  if (sched_setaffinity(0, sizeof others, &others) == 0)
    sched_setaffinity(0, sizeof allowed, &allowed);
}

void offer_cpu() {
  const auto start = Clock::now();
  if (start.time_since_epoch().count() < next_offer.load(std::memory_order_relaxed)) return;
  sched_yield();
  const auto end = Clock::now();
  if (end - start > longest_offer) {
    const auto next = end + rest_after_loss * (end - start);
    next_offer.store(next.time_since_epoch().count(), std::memory_order_relaxed);
  }
}

}  // namespace fusedstep::cpu
