#include "fibers.hpp"

#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// --- switching --------------------------------------------------------------------------------

// swapcontext() asks the system to switch the signal mask, which takes a hundred times as long as
// all the rest.
#if defined(__x86_64__)
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {
namespace {

constexpr std::size_t guard_size = 4096;
__thread Fiber* starting = nullptr;

char* make_stack() {
  void* memory = mmap(nullptr, guard_size + Fiber::stack_size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard_size, PROT_NONE) != 0) {
    std::perror("emulator: no memory for the stack of a thread");
    std::abort();
  }
  return static_cast<char*>(memory);
}

// Not a mutex, in which ThreadSanitizer would see an order of blocks.
std::atomic_flag pool_lock = ATOMIC_FLAG_INIT;
std::vector<std::unique_ptr<Fiber>>& pool() {
  static auto* all = new std::vector<std::unique_ptr<Fiber>>;  // for good
  return *all;
}
struct PoolLock {
  PoolLock() {
    while (pool_lock.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  }
  ~PoolLock() { pool_lock.clear(std::memory_order_release); }
};

void switch_to(Context& from, Context& to) {
#if defined(EMULATOR_TSAN)
  from.tsan_fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
}

}  // namespace

Fiber::Fiber() : stack_(make_stack()) {
#if defined(EMULATOR_TSAN)
  own_.tsan_fiber = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if defined(EMULATOR_TSAN)
  __tsan_destroy_fiber(own_.tsan_fiber);
#endif
  munmap(stack_, guard_size + stack_size);
}

void Fiber::prepare(void (*body)(void*), void* argument) {
  body_ = body;
  argument_ = argument;
  own_.fake_stack = nullptr;
  char* bottom = stack_ + guard_size;
#if defined(EMULATOR_ASAN)
  __asan_unpoison_memory_region(bottom, stack_size);
#endif
#if defined(__x86_64__)
  // As if `enter` had just been called, from address 0.
  auto** top = reinterpret_cast<void**>(bottom + stack_size);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::enter);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  own_.stack_pointer = top;
#else
  getcontext(&own_.registers);
  own_.registers.uc_stack.ss_sp = bottom;
  own_.registers.uc_stack.ss_size = stack_size;
  own_.registers.uc_link = nullptr;
  makecontext(&own_.registers, &Fiber::enter, 0);
#endif
}

void Fiber::enter() {
  Fiber* self = starting;
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack_, &self->caller_stack_size_);
#endif
  self->body_(self->argument_);
  std::abort();  // it has not called `finish`
}

void Fiber::resume() {
  starting = this;
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&caller_.fake_stack, stack_ + guard_size, stack_size);
#endif
  switch_to(caller_, own_);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(caller_.fake_stack, nullptr, nullptr);
#endif
}

void Fiber::switch_back([[maybe_unused]] bool for_good) {
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &own_.fake_stack, caller_stack_,
                                 caller_stack_size_);
#endif
  switch_to(own_, caller_);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(own_.fake_stack, &caller_stack_, &caller_stack_size_);
#endif
}

void Fiber::pause() { switch_back(false); }

void Fiber::finish() {
  switch_back(true);
  std::abort();  // it was resumed after its end
}

Fibers::Fibers(std::size_t count) {
  const PoolLock lock;
  for (; !pool().empty() && all_.size() < count; pool().pop_back())
    all_.push_back(std::move(pool().back()));
  while (all_.size() < count) all_.push_back(std::make_unique<Fiber>());
}

Fibers::~Fibers() {
  const PoolLock lock;
  for (std::unique_ptr<Fiber>& fiber : all_) pool().push_back(std::move(fiber));
}

}  // namespace emulator
