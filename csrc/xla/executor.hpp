#pragma once
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "xla/common.hpp"

namespace fusedstep::xla {

/// A parallel region on XLA's pool. The pool may start a task late, or never while the region runs:
/// its threads may all be in handlers like this one, each waiting for the others' tasks. So a
/// region waits only for tasks that have entered it, and one that comes late finds it closed.
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

/// XLA's pool, seen by the core. It is used in the handler that got it, and not afterwards.
class PoolExecutor {
 public:
  explicit PoolExecutor(ffi::ThreadPool& pool) : pool_(pool), executor_{this, run} {
    const char* error = nullptr;
    const int own = core->num_threads(&error);
    if (error) throw std::runtime_error(error);
    threads_ = static_cast<int>(std::clamp<std::int64_t>(pool.num_threads(), 1, own));
  }
  PoolExecutor(const PoolExecutor&) = delete;
  PoolExecutor& operator=(const PoolExecutor&) = delete;

  void use_in(StepCall& call) const {
    call.num_threads = threads_;
    call.executor = &executor_;
  }

 private:
  using Body = void (*)(void* body_context, int worker);

  static void run(void* context, int threads, Body body, void* body_context) {
    const auto region = std::make_shared<Region>();
    for (int worker = 1; worker < threads; ++worker) {
      static_cast<PoolExecutor*>(context)->pool_.Schedule([=] {
        if (!region->enter()) return;
        body(body_context, worker);
        region->leave();
      });
    }
    body(body_context, 0);
    region->close();
  }

  ffi::ThreadPool& pool_;
  Executor executor_;
  int threads_;
};

}  // namespace fusedstep::xla
