#pragma once
#include <string>

/// The OpenMP runtime of this process, found at run time. Linking or bundling one would put a
/// second copy beside the framework's, and their spinning workers would starve each other.
namespace fusedstep::cpu {

/// The entry points we use. GNU's are exported by LLVM's and Intel's runtimes too.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
  int (*max_threads)();
  int (*in_parallel)();
  std::string path;
  OpenMP* next;
};

/// The runtime that other libraries of this process use, else (if `open_system`) the system's,
/// which is then loaded; null if there is none. A runtime that a framework brings later is found by
/// the next call and preferred. The result stays valid for ever. Starts no thread; costs a fraction
/// of a microsecond if no library was loaded since the last call.
const OpenMP* find_openmp(bool open_system);

/// Why the system's runtime could not be opened, for error messages.
std::string openmp_open_error();

/// For the child of a fork: another thread may have held the lock.
void reset_openmp_lock();

}  // namespace fusedstep::cpu
