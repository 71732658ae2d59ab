#pragma once
#include <link.h>

#include <cfenv>
#include <cstddef>
#include <cstdint>
#include <vector>

/// What sanitizers have to be told of a kernel, and cannot see.
namespace emulator {

/// Where threads meet and see what the others did before. Two places in turn: a fast thread arrives
/// at the next meeting before a slow one has left this one.
class Meeting {
 public:
  char* turn() { return &turns_[number_ % 2]; }
  void complete() { ++number_; }

 private:
  char turns_[2] = {};
  unsigned number_ = 0;
};

#if defined(EMULATOR_TSAN)
/// What this thread has done is seen by whoever acquires at the same address later.
void release_at(void* address);
void acquire_at(void* address);
/// Called by the thread of the system that is about to run fibers.
void watch_fibers();
#else
inline void release_at(void* /*address*/) {}
inline void acquire_at(void* /*address*/) {}
inline void watch_fibers() {}
#endif

/// The fences of one thread, in the model of CUDA and C++: what it did before a fence is seen by a
/// thread that has read what this one wrote atomically after that fence, and had a fence after the
/// reading. What comes between fence and atomic operation is not.
class Fences {
 public:
  void fence();
  void before_atomic(void* address);
  void after_atomic(void* address);
  /// The thread returns.
  void forget();

 private:
  char before_ = 0, after_ = 0;  // what was done before the last fence; what the next one shows
  bool fenced_ = false, read_ = false;
  // Two threads that do nothing but carry this knowledge, and nothing else, to and from addresses.
  void* releaser_ = nullptr;
  void* acquirer_ = nullptr;
};
Fences& current_fences();

/// Lets a thread of the system wait, in a way that ThreadSanitizer does not take for an order.
class Gate {
 public:
  void wait();
  void open();

 private:
  std::uint32_t open_ = 0;
};

/// A thread of the system while it runs a kernel. Its thread-local variables, of the module that
/// the kernel is in, serve as __shared__ ones (and as the emulator's own, which every block sets);
/// the floating-point environment is the GPU's. Both are put back.
class BorrowedThread {
 public:
  explicit BorrowedThread(const void* kernel);
  ~BorrowedThread();
  BorrowedThread(const BorrowedThread&) = delete;
  BorrowedThread& operator=(const BorrowedThread&) = delete;
  /// Before every block: a GPU does not zero shared memory either.
  void poison_shared_memory();

 private:
  struct Variables {
    const void* kernel;
    void* data;
    std::size_t size;
  };
  static int find(dl_phdr_info* module, std::size_t size, void* variables);

  Variables variables_;
  std::vector<char> saved_;
  std::fenv_t environment_;
};

}  // namespace emulator
