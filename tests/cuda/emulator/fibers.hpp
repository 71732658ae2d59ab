#pragma once
#include <cstddef>
#include <memory>
#include <vector>

#if defined(EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

/// Threads that one thread of the system switches between.
namespace emulator {

/// Whether this build is watched by ThreadSanitizer: it takes every fiber for a thread, and a
/// switch orders nothing. (The emulator's own files are compiled without it, so that what they
/// share is not mistaken for what kernels share.)
#if defined(EMULATOR_TSAN)
constexpr bool with_tsan = true;
#else
constexpr bool with_tsan = false;
#endif

/// Where a thread of the system, or a fiber, has been left.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan_fiber = nullptr;
};

class Fiber {
 public:
  static constexpr std::size_t stack_size =
#if defined(EMULATOR_ASAN)
      std::size_t{256} << 10;
#else
      std::size_t{128} << 10;
#endif

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Makes it ready to run `body(argument)`, which has to call `finish` at its end; whatever it ran
  /// before is forgotten.
  void prepare(void (*body)(void*), void* argument);
  /// Runs it until it calls `pause` or `finish`. Called from one and the same thread always.
  void resume();
  /// Called in the fiber: returns to the caller of `resume`.
  void pause();
  [[noreturn]] void finish();

 private:
  static void enter();
  void switch_back(bool for_good);

  char* stack_;  // with a page below that must not be touched
  Context own_, caller_;
  const void* caller_stack_ = nullptr;
  std::size_t caller_stack_size_ = 0;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
};

/// Some fibers out of a pool, where they go back to: making one takes as long as running it.
class Fibers {
 public:
  explicit Fibers(std::size_t count);
  ~Fibers();
  Fibers(Fibers&&) = default;
  Fiber& operator[](std::size_t i) { return *all_[i]; }

 private:
  std::vector<std::unique_ptr<Fiber>> all_;
};

}  // namespace emulator
