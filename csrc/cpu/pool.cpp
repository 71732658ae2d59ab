#include "cpu/pool.hpp"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>

#include "cpu/placement.hpp"

namespace fusedstep::cpu {
namespace {

using Futex = std::atomic<std::uint32_t>;
static_assert(sizeof(Futex) == 4 && Futex::is_always_lock_free);

void futex_wait(Futex& word, std::uint32_t expected) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(Futex& word, int waiters) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, waiters, nullptr, nullptr, 0);
}

/// The region being run, in one word, so that a thread joins it with one compare-and-swap or finds
/// it closed: the caller waits for those that joined, never for one that has not woken up.
struct Job {
  std::uint32_t generation;
  std::uint16_t vacancies;  ///< threads that may still join
  std::uint16_t joined;

  static Job unpack(std::uint64_t word) {
    return {static_cast<std::uint32_t>(word >> 32), static_cast<std::uint16_t>(word >> 16),
            static_cast<std::uint16_t>(word)};
  }
  static std::uint64_t pack(std::uint32_t generation, int vacancies) {
    return std::uint64_t{generation} << 32 | static_cast<std::uint64_t>(vacancies) << 16;
  }
  static constexpr std::uint64_t all_vacancies = 0xffff0000;
  static constexpr std::uint64_t one_joins = 1 - (std::uint64_t{1} << 16);  // added to the word
};

class Pool {
 public:
  void run(int threads, RegionBody body, void* context);

 private:
  void start_threads(int wanted);
  [[noreturn]] void work();
  bool take_part(std::uint32_t& last_generation);
  void wait_for(int joined);

  // The caller, when it sleeps, sets this bit of finished_.
  static constexpr std::uint32_t caller_sleeps = 0x80000000;
  // Each woken thread wakes two more: one system call per thread would cost a caller on 64 cores
  // more than the region.
  static constexpr int wake_fanout = 2;
  // About 10 us. A sleeping caller would give its core away for the last chunk of another thread.
  static constexpr int caller_spins = 200;

  std::atomic<bool> busy_{false};
  int num_threads_ = 0;
  RegionBody body_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int> caller_cpu_{-1};
  std::atomic<std::uint64_t> job_{0};
  Futex generation_{0};  // counts regions; idle threads sleep on it
  Futex finished_{0};    // threads that have left the region
};

void Pool::start_threads(int wanted) {
  if (num_threads_ >= wanted) return;
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, std::size_t{2} << 20);  // musl's default is 128 KiB
  // Signals belong to the threads of the application.
  sigset_t all, previous;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &previous);
  const auto entry = [](void* pool) -> void* { static_cast<Pool*>(pool)->work(); };
  pthread_t thread;
  while (num_threads_ < wanted && pthread_create(&thread, &attributes, entry, this) == 0)
    ++num_threads_;  // if the system refuses, the region runs with the threads there are
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  pthread_attr_destroy(&attributes);
}

void Pool::work() {
#if defined(__GLIBC__)
  pthread_setname_np(pthread_self(), "fusedstep");
#endif
  std::uint32_t last_generation = 0;  // regions count from 1
  for (;;) {
    const std::uint32_t generation = generation_.load(std::memory_order_acquire);
    if (take_part(last_generation)) continue;
    futex_wait(generation_, generation);
    leave_cpu(caller_cpu_.load(std::memory_order_relaxed));
  }
}

bool Pool::take_part(std::uint32_t& last_generation) {
  std::uint64_t word = job_.load(std::memory_order_acquire);
  do {
    const Job offered = Job::unpack(word);
    if (offered.vacancies == 0 || offered.generation == last_generation) return false;
  } while (!job_.compare_exchange_weak(word, word + Job::one_joins, std::memory_order_acq_rel,
                                       std::memory_order_acquire));
  const Job job = Job::unpack(word);
  last_generation = job.generation;
  if (job.vacancies > 1) futex_wake(generation_, std::min(wake_fanout, job.vacancies - 1));
  body_(context_, job.joined + 1);
  // From here on the caller may return and start another region.
  if (finished_.fetch_add(1, std::memory_order_acq_rel) & caller_sleeps) futex_wake(finished_, 1);
  return true;
}

void Pool::run(int threads, RegionBody body, void* context) {
  if (busy_.exchange(true, std::memory_order_acquire)) return body(context, 0);
  start_threads(threads - 1);
  const int vacancies = std::min(threads - 1, num_threads_);
  body_ = body;
  context_ = context;
  caller_cpu_.store(current_cpu(), std::memory_order_relaxed);
  finished_.store(0, std::memory_order_relaxed);
  std::uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
  if (generation == 0) generation = 1;  // the first value of every thread's last_generation
  job_.store(Job::pack(generation, vacancies), std::memory_order_release);
  generation_.store(generation, std::memory_order_release);
  futex_wake(generation_, std::min(wake_fanout, vacancies));
  if (Job::unpack(job_.load(std::memory_order_relaxed)).joined == 0) offer_cpu();
  body(context, 0);
  const std::uint64_t word = job_.fetch_and(~Job::all_vacancies, std::memory_order_acq_rel);
  wait_for(Job::unpack(word).joined);
  busy_.store(false, std::memory_order_release);
}

void Pool::wait_for(int joined) {
  const auto target = static_cast<std::uint32_t>(joined);
  int spins = 0;
  std::uint32_t finished = finished_.load(std::memory_order_acquire);
  while ((finished & ~caller_sleeps) < target) {
    if (spins++ < caller_spins) {
      relax_cpu();
    } else if (finished & caller_sleeps) {
      futex_wait(finished_, finished);
    } else {
      finished_.fetch_or(caller_sleeps, std::memory_order_acq_rel);
    }
    finished = finished_.load(std::memory_order_acquire);
  }
}

// Never destroyed: its threads may still look at it while the process exits.
Pool pool;
static_assert(std::is_trivially_destructible_v<Pool>);

}  // namespace

void run_on_pool(int threads, RegionBody body, void* context) { pool.run(threads, body, context); }

void reset_pool() { new (&pool) Pool; }

}  // namespace fusedstep::cpu
