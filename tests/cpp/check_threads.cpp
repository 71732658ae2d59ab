// Checks of the parallel regions. Without an argument it runs itself once per setting, since a
// process reads FUSEDSTEP_THREADS_RUNTIME once. Prints "N passed, M failed"; the exit status is 1
// if M > 0.

#include <dirent.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/openmp.hpp"
#include "cpu/threads.hpp"

#if defined(__SANITIZE_THREAD__)
// Own threads start anew in a forked child; by default ThreadSanitizer ends such a child.
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }
#endif

namespace {

std::atomic<long> allocations{0};

}  // namespace

void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using fusedstep::cpu::get_num_threads;
using fusedstep::cpu::run_region;
using fusedstep::cpu::set_num_threads;
using fusedstep::cpu::thread_runtime;
using Clock = std::chrono::steady_clock;

const std::string setting = [] {
  const char* value = std::getenv("FUSEDSTEP_THREADS_RUNTIME");
  return std::string(value ? value : "");
}();

int passed = 0;
int failed = 0;

void check(bool right, int line, const char* text) {
  ++(right ? passed : failed);
  if (!right) std::printf("FAIL line %d: %s\n", line, text);
}

#define CHECK(condition) check((condition), __LINE__, #condition)

// --- a body that shares out its work, as run_region asks for ------------------------------------

constexpr int most_workers = 256;

struct Work {
  Work(int most_threads, int count)
      : threads(std::clamp(most_threads, 1, most_workers)), items(count) {}
  int threads;
  int items;
  std::atomic<int> next{0};
  std::atomic<int> inside{0};
  std::atomic<bool> misplaced{false};  // a worker index out of range, twice, or not the caller's
  std::atomic<int> entries[most_workers] = {};
  std::vector<int> done = std::vector<int>(static_cast<std::size_t>(items));
  std::thread::id caller = std::this_thread::get_id();
};

void share_out(void* context, int worker) {
  auto& work = *static_cast<Work*>(context);
  work.inside.fetch_add(1);
  const bool is_caller = std::this_thread::get_id() == work.caller;
  if (worker < 0 || worker >= work.threads || is_caller != (worker == 0)) {
    work.misplaced = true;
  } else if (work.entries[worker].fetch_add(1) != 0) {
    work.misplaced = true;
  }
  for (int i; (i = work.next.fetch_add(1)) < work.items;) ++work.done[static_cast<std::size_t>(i)];
  work.inside.fetch_sub(1);
}

bool region_is_right(int threads, int items) {
  Work work(threads, items);
  run_region(threads, share_out, &work);
  const bool all_done =
      std::all_of(work.done.begin(), work.done.end(), [](int n) { return n == 1; });
  return all_done && work.inside == 0 && !work.misplaced && work.entries[0] == 1;
}

/// Waits up to a second until `expected` workers are in the region at once.
struct Meeting {
  int expected;
  std::atomic<int> arrived{0};
};

bool workers_meet(int threads) {
  Meeting meeting{threads};
  const auto wait = [](void* context, int) {
    auto& shared = *static_cast<Meeting*>(context);
    shared.arrived.fetch_add(1);
    const auto end = Clock::now() + std::chrono::seconds(1);
    while (shared.arrived < shared.expected && Clock::now() < end) std::this_thread::yield();
  };
  run_region(threads, wait, &meeting);
  return meeting.arrived == threads;
}

// --- the process ---------------------------------------------------------------------------------

int threads_of_process() {
  int count = 0;
  DIR* tasks = opendir("/proc/self/task");
  while (const dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
  closedir(tasks);
  return count;
}

double cpu_seconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

bool is_own() { return thread_runtime().rfind("own threads", 0) == 0; }

bool throws_at_first_use() {
  try {
    run_region(2, [](void*, int) {}, nullptr);
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

/// Runs `body` in a forked child that is killed after 20 s; true if it returned true in time.
template <class Body>
bool in_forked_child(Body body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(body() ? 0 : 1);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
         WEXITSTATUS(status) == 0;
}

// --- checks --------------------------------------------------------------------------------------

void check_counts() {
  const int before = threads_of_process();
  const int count = get_num_threads();
  CHECK(threads_of_process() == before);
  CHECK(count >= 1 && count <= most_workers);
  if (const char* variable = std::getenv("OMP_NUM_THREADS")) CHECK(count == std::atoi(variable));
  set_num_threads(3);
  CHECK(get_num_threads() == 3);
  set_num_threads(100000);
  CHECK(get_num_threads() == most_workers);
  set_num_threads(0);
  CHECK(get_num_threads() == count);
  bool refused = false;
  try {
    set_num_threads(-1);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

void check_regions() {
  for (const int threads : {-1, 0, 1, 2, 3, 8, 2, 1, 5, 1000}) {
    CHECK(region_is_right(threads, 0));
    CHECK(region_is_right(threads, 1));
    CHECK(region_is_right(threads, 10000));
  }
  int wrong = 0;
  for (int i = 0; i < 2000; ++i) wrong += !region_is_right(2 + i % 3, 40);
  CHECK(wrong == 0);
  CHECK(workers_meet(2));
  CHECK(workers_meet(5));
}

void count_entry(void* counter, int worker) {
  *static_cast<std::atomic<int>*>(counter) += worker == 0 ? 1 : 1000;
}

void check_nested() {
  struct Counts {
    std::atomic<int> outer{0}, inner{0};
  } counts;
  const auto body = [](void* context, int) {
    ++static_cast<Counts*>(context)->outer;
    run_region(4, count_entry, &static_cast<Counts*>(context)->inner);
  };
  run_region(3, body, &counts);
  CHECK(counts.outer >= 1 && counts.inner == counts.outer);
}

void check_inside_foreign_region() {
  const auto* openmp = fusedstep::cpu::find_openmp(false);
  if (!openmp || is_own()) return;
  struct Counts {
    std::atomic<int> outer{0}, inner{0};
  } counts;
  const auto body = [](void* context) {
    ++static_cast<Counts*>(context)->outer;
    run_region(4, count_entry, &static_cast<Counts*>(context)->inner);
  };
  openmp->parallel(body, &counts, 2, 0);
  CHECK(counts.outer == 2 && counts.inner == 2);
}

void check_concurrent_callers() {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&wrong] {
      for (int k = 0; k < 500; ++k) wrong += !region_is_right(2 + k % 2, 100);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

void check_rest() {
  if (!is_own()) return;  // an OpenMP runtime spins as it likes
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(workers_meet(6));  // sleeping threads wake each other
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(cpu_seconds() - before < 0.02);
}

void check_allocations() {
  std::atomic<int> entries{0};
  run_region(4, count_entry, &entries);
  const long before = allocations;
  for (int i = 0; i < 100; ++i) run_region(4, count_entry, &entries);
  CHECK(allocations == before);
  CHECK(entries % 1000 == 101);  // the caller always takes part
}

void check_fork() {
  CHECK(region_is_right(4, 1000));
  const std::string runtime = thread_runtime();
  // All four meet, so that no thread is still starting when the child forks again: AddressSanitizer
  // holds a lock then, which the grandchild would wait for.
  const auto child = [] { return is_own() && region_is_right(4, 1000) && workers_meet(4); };
  if (setting == "openmp") {
    CHECK(in_forked_child(throws_at_first_use));
  } else {
    CHECK(in_forked_child(child));
    CHECK(in_forked_child([&] { return child() && in_forked_child(child) && child(); }));
  }
  CHECK(thread_runtime() == runtime && region_is_right(4, 1000) && workers_meet(2));
}

void check_fork_while_busy() {
#if defined(__SANITIZE_ADDRESS__)
  return;  // its allocator may be locked by the busy thread at the fork, and then for ever
#endif
  if (setting == "openmp") return;
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::thread busy([&] {
    while (!stop) wrong += !region_is_right(2, 200);
  });
  int hung = 0;
  for (int i = 0; i < 20; ++i) hung += !in_forked_child([] { return region_is_right(3, 200); });
  stop = true;
  busy.join();
  CHECK(hung == 0 && wrong == 0);
}

void check_bad_setting() {
  CHECK(throws_at_first_use());
  int thrown = 0;
  try {
    get_num_threads();
  } catch (const std::runtime_error&) {
    ++thrown;
  }
  try {
    thread_runtime();
  } catch (const std::runtime_error&) {
    ++thrown;
  }
  CHECK(thrown == 2);
}

void check_setting() {
  if (setting == "bad" || (setting == "openmp" && !fusedstep::cpu::find_openmp(true))) {
    if (setting == "bad") check_bad_setting();
    CHECK(throws_at_first_use());
    return;
  }
  check_counts();
  if (setting == "own") CHECK(is_own());
  if (setting == "openmp") CHECK(!is_own());
  check_regions();
  check_nested();
  check_inside_foreign_region();
  check_concurrent_callers();
  check_rest();
  check_allocations();
  check_fork();
  check_fork_while_busy();
}

/// Runs this program under `environment` and adds its counts to ours.
void run_with(const std::string& environment) {
  char program[4096] = {};
  if (readlink("/proc/self/exe", program, sizeof program - 1) < 0) std::abort();
  const std::string command = "env " + environment + " '" + program + "' one-setting";
  std::FILE* output = popen(command.c_str(), "r");
  int more_passed = 0, more_failed = 0;
  bool complete = false;
  for (char line[1024]; output && std::fgets(line, sizeof line, output);) {
    complete = std::sscanf(line, "%d passed, %d failed", &more_passed, &more_failed) == 2;
    if (!complete) std::printf("%s: %s", environment.c_str(), line);
  }
  const int status = output ? pclose(output) : -1;
  passed += more_passed;
  failed += more_failed;
  // Also: the process ended, though its threads sleep.
  check(complete && (status == 0 || more_failed > 0), __LINE__, command.c_str());
}

}  // namespace

int main(int count, char**) {
  if (count > 1) {
    check_setting();
  } else {
    run_with("FUSEDSTEP_THREADS_RUNTIME=own");
    run_with("FUSEDSTEP_THREADS_RUNTIME=own OMP_NUM_THREADS=3,2");
    run_with("FUSEDSTEP_THREADS_RUNTIME=bad");
#if !defined(__SANITIZE_THREAD__)  // which does not see how an OpenMP runtime synchronizes
    run_with("FUSEDSTEP_THREADS_RUNTIME=");
    run_with("FUSEDSTEP_THREADS_RUNTIME= OMP_NUM_THREADS=3 OMP_MAX_ACTIVE_LEVELS=2");
    run_with("FUSEDSTEP_THREADS_RUNTIME=openmp");
#endif
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
