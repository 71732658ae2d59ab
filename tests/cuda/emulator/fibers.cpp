#include "fibers.hpp"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

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

/// Stacks are kept: making one takes as long as running a small block.
class Stacks {
 public:
  char* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      char* stack = free_.back();
      free_.pop_back();
      return stack;
    }
    void* memory = mmap(nullptr, guard_size + Fiber::stack_size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard_size, PROT_NONE) != 0) {
      std::perror("emulator: no memory for the stack of a thread");
      std::abort();
    }
    return static_cast<char*>(memory);
  }
  void give(char* stack) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(stack);
  }

 private:
  std::mutex mutex_;
  std::vector<char*> free_;
};

Stacks& stacks() {
  static auto* all = new Stacks;  // for good: threads may end after the destructors of statics
  return *all;
}

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

Fiber::Fiber() : stack_(stacks().take()) {
#if defined(EMULATOR_TSAN)
  own_.tsan_fiber = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if defined(EMULATOR_TSAN)
  __tsan_destroy_fiber(own_.tsan_fiber);
#endif
  stacks().give(stack_);
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

}  // namespace emulator
