#pragma once
#include <algorithm>
#include <utility>

#include "xla/common.hpp"
#include "xla/region.hpp"

namespace fusedstep::xla {

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
    ffi::ThreadPool& pool = static_cast<PoolExecutor*>(context)->pool_;
    run_region(threads, body, body_context, [&](auto task) { pool.Schedule(std::move(task)); });
  }

  ffi::ThreadPool& pool_;
  Executor executor_;
  int threads_;
};

}  // namespace fusedstep::xla
