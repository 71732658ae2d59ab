// Checks of steps on another pool of threads than our own (xla/region.hpp): one that starts tasks
// at once, late, in between, or never. Prints "N passed, M failed"; the exit status is 1 if M > 0.

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <queue>
#include <thread>

#include "checks.hpp"
#include "xla/region.hpp"

namespace {

using namespace checks;

/// Runs what it is given on a few threads, from `open` on.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int t = 0; t < threads; ++t) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    open();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void open() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      open_ = true;
    }
    changed_.notify_all();
  }
  void schedule(std::function<void()> task) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push(std::move(task));
    }
    changed_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return ended_ || (open_ && !tasks_.empty()); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::queue<std::function<void()>> tasks_;
  bool open_ = false, ended_ = false;
  std::vector<std::thread> threads_;
};

void run_in(void* pool, int threads, void (*body)(void*, int), void* body_context) {
  xla::run_region(threads, body, body_context,
                  [&](auto task) { static_cast<Pool*>(pool)->schedule(std::move(task)); });
}

void run_inline(void* /*context*/, int threads, void (*body)(void*, int), void* body_context) {
  xla::run_region(threads, body, body_context, [](auto task) { task(); });
}

void refuse(void* /*context*/, int threads, void (*body)(void*, int), void* body_context) {
  int scheduled = 0;
  xla::run_region(threads, body, body_context, [&](auto task) {
    if (scheduled++ == 1) throw std::bad_alloc();
    task();
  });
}

/// A step with a clip: two stages, the second of which needs all of the first.
void step(Buffers& all, const Executor* executor) {
  Call call(tensors_of(all));
  call.rows[0].rule = 1;
  call.rows[0].clip_norm = 1.0;
  std::fill_n(call.rows[0].hyper, 7, 0.5);
  call.call.measure_norm = true;
  call.call.num_threads = executor ? 4 : 1;
  call.call.executor = executor;
  call.run();
}

void check_steps(const std::string& what, const Executor& executor) {
  Buffers all = make({f32, f32, f32}, {200000, 5, 70000}, 1);
  Buffers expected = all;
  step(expected, nullptr);
  step(all, &executor);
  check(difference(all, expected).empty(), what);
}

/// Every thread of the pool is in a region, and waits for tasks that stand behind it in the queue.
void check_full_pool() {
  constexpr int regions = 4;
  std::vector<Buffers> all(regions, make({f32, f32, f32}, {200000}, 1));
  Buffers expected = all[0];
  step(expected, nullptr);
  std::atomic<int> done{0};
  {
    Pool pool(2);
    const Executor executor{&pool, run_in};
    for (int k = 0; k < regions; ++k) {
      Buffers& one = all[static_cast<std::size_t>(k)];
      pool.schedule([&one, &executor, &done] {
        step(one, &executor);
        ++done;
      });
    }
    pool.open();
    while (done < regions) std::this_thread::yield();
  }
  for (const Buffers& one : all) check(difference(one, expected).empty(), "a full pool");
}

}  // namespace

int main() {
  for (int round = 0; round < 20; ++round) {
    Pool pool(3);
    pool.open();
    check_steps("a pool", {&pool, run_in});
  }
  {
    Pool late(2);  // opened by its end: after the steps
    check_steps("a pool that starts nothing in time", {&late, run_in});
    check_steps("the same again", {&late, run_in});
  }
  check_steps("a pool that runs tasks in the caller", {nullptr, run_inline});
  check_steps("a pool that has no memory left", {nullptr, refuse});
  for (int round = 0; round < 5; ++round) check_full_pool();
  return report();
}
