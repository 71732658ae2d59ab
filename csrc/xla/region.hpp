#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

/// Parallel regions on somebody else's pool of threads.
namespace fusedstep::xla {

/// Who is in a region. A pool may start a task late, or never while the region runs: its threads
/// may all be in regions like this one, each waiting for the others' tasks. So a region waits only
/// for those that have entered it, and who comes late finds it closed.
class Region {
 public:
  bool enter() {
    std::int64_t seen = gate_.load(std::memory_order_relaxed);
    while (!(seen & closed))
      if (gate_.compare_exchange_weak(seen, seen + one, std::memory_order_acquire)) return true;
    return false;
  }
  void leave() { gate_.fetch_sub(one, std::memory_order_release); }

  /// Lets nobody in any more, and waits until all are out.
  void close() {
    gate_.fetch_or(closed, std::memory_order_relaxed);
    while (gate_.load(std::memory_order_acquire) != closed) sched_yield();
  }

 private:
  static constexpr std::int64_t closed = 1, one = 2;
  std::atomic<std::int64_t> gate_{0};
};

/// Runs `body(body_context, worker)` in the caller, and in the tasks that `schedule(task)` starts
/// in time. What the tasks hold may outlive the call; `body_context` need not.
template <class Schedule>
void run_region(int threads, void (*body)(void*, int), void* body_context, Schedule schedule) {
  std::shared_ptr<Region> region;
  try {
    region = std::make_shared<Region>();
    for (int worker = 1; worker < threads; ++worker) {
      schedule([=] {
        if (!region->enter()) return;
        body(body_context, worker);
        region->leave();
      });
    }
  } catch (const std::bad_alloc&) {  // those that could be scheduled will do
  }
  body(body_context, 0);
  if (region) region->close();
}

}  // namespace fusedstep::xla
