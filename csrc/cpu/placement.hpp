#pragma once

/// Gets woken threads onto CPUs of their own.
///
/// Linux often puts a woken thread behind its waker on the waker's CPU although others are idle: in
/// a virtual machine an idle CPU is halted, which its scheduler takes for "preempted by the host".
/// There the thread waits for milliseconds while the caller does all the work (measured on 2 CPUs
/// of KVM, Linux 6.18: a region of 0.2 ms after 20 ms of rest took 5.5 ms on libgomp, whose caller
/// then spins for the thread behind it; 0.4 ms with what follows).
namespace fusedstep::cpu {

int current_cpu();

/// One turn of a short spin.
inline void relax_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// For a worker that finds itself on the CPU of the caller: moves to another that it may use. Its
/// affinity mask is afterwards what it was.
void leave_cpu(int cpu);

/// For a caller whose workers do not show up: lets a thread that waits for this CPU run. Stops
/// doing so for a while if it gave the CPU to some busy process instead.
void offer_cpu();

}  // namespace fusedstep::cpu
