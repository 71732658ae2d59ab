#include "watch.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"
#include "fibers.hpp"

namespace emulator {

#if defined(EMULATOR_TSAN)

namespace {

__thread void* system_thread = nullptr;

/// Does something as another thread. There is no switch of stacks: only names change.
template <class Do>
void as(void*& fiber, Do what) {
  void* const self = __tsan_get_current_fiber();
  if (!fiber) {
    // Made by a thread that knows nothing of what this one did: the new one inherits that.
    __tsan_switch_to_fiber(system_thread, __tsan_switch_to_fiber_no_sync);
    fiber = __tsan_create_fiber(0);
  }
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
  what();
  __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
}

}  // namespace

void release_at(void* address) { __tsan_release(address); }
void acquire_at(void* address) { __tsan_acquire(address); }
void watch_fibers() { system_thread = __tsan_get_current_fiber(); }

void Fences::fence() {
  if (read_) acquire_at(&after_);
  release_at(&before_);
  fenced_ = true;
}

void Fences::before_atomic(void* address) {
  if (!fenced_) return;
  as(releaser_, [&] {
    acquire_at(&before_);
    release_at(address);
  });
}

void Fences::after_atomic(void* address) {
  as(acquirer_, [&] {
    acquire_at(address);
    release_at(&after_);
  });
  read_ = true;
}

void Fences::forget() {
  for (void* fiber : {releaser_, acquirer_})
    if (fiber) __tsan_destroy_fiber(fiber);
}

#else

void Fences::forget() {}

#endif

void Gate::wait() {
  while (!__atomic_load_n(&open_, __ATOMIC_ACQUIRE))
    syscall(SYS_futex, &open_, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
}

void Gate::open() {
  __atomic_store_n(&open_, 1, __ATOMIC_RELEASE);
  syscall(SYS_futex, &open_, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

int BorrowedThread::find(dl_phdr_info* module, std::size_t /*size*/, void* variables) {
  auto& wanted = *static_cast<Variables*>(variables);
  bool found = false;
  std::size_t size = 0;
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const ElfW(Phdr) & part = module->dlpi_phdr[i];
    const ElfW(Addr) at = reinterpret_cast<ElfW(Addr)>(wanted.kernel) - module->dlpi_addr;
    if (part.p_type == PT_LOAD && at - part.p_vaddr < part.p_memsz) found = true;
    if (part.p_type == PT_TLS) size = part.p_memsz;
  }
  if (!found) return 0;
  wanted.data = module->dlpi_tls_data;
  wanted.size = wanted.data ? size : 0;
  return 1;
}

BorrowedThread::BorrowedThread(const void* kernel) : variables_{kernel, nullptr, 0} {
  std::fegetenv(&environment_);
  std::fesetenv(FE_DFL_ENV);
  *const_cast<volatile unsigned*>(&blockIdx.x) = 0;  // the first access makes room for them
  dl_iterate_phdr(find, &variables_);
  // ThreadSanitizer would see writes. There, a thread of the system runs one block and nothing
  // else.
  if (with_tsan) variables_.size = 0;
  const char* data = static_cast<const char*>(variables_.data);
  saved_.assign(data, data + variables_.size);
}

BorrowedThread::~BorrowedThread() {
  if (!saved_.empty()) std::memcpy(variables_.data, saved_.data(), saved_.size());
  std::fesetenv(&environment_);
}

void BorrowedThread::poison_shared_memory() {
  if (variables_.size) std::memset(variables_.data, 0xcd, variables_.size);
}

}  // namespace emulator

#if defined(EMULATOR_TSAN)
void __threadfence() { emulator::current_fences().fence(); }

// ThreadSanitizer does not see the operation itself. It would complain, by the letter, of the block
// that sets a counter back which it has just found to be the last to count at.
unsigned atomicAdd(unsigned* address, unsigned value) {
  emulator::Fences& fences = emulator::current_fences();
  fences.before_atomic(address);
  const unsigned old = __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  fences.after_atomic(address);
  return old;
}
#endif
