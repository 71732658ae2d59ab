#pragma once

/// Gets woken threads onto CPUs of their own.
///
/// Linux may put a woken thread behind its waker on the waker's CPU although another is idle; in
/// virtual machines it does so often (probably because a halted CPU counts as preempted by the
/// host). There the thread waits for milliseconds while the caller does all the work. Measured on 2
/// CPUs under KVM, Linux 6.18: a region of 0.2 ms after 20 ms of sleep took 5.5 ms on libgomp,
/// whose caller then spins in front of the thread it waits for; 0.4 ms with what follows, 0.6 ms
/// serial.
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
