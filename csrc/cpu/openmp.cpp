#include "cpu/openmp.hpp"

#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace fusedstep::cpu {
namespace {

const char* const system_libraries[] = {"libgomp.so.1", "libomp.so.5", "libomp.so"};

// All of it is constant-initialized and never destroyed: it is used from the load of the module to
// the last instruction of the process. The mutex guards what is not atomic.
std::mutex scan_mutex;
OpenMP* known = nullptr;                // every runtime ever used; nodes are never freed
const OpenMP* system_openmp = nullptr;  // the one that we loaded ourselves
std::string* open_error = nullptr;      // why none could be loaded
std::atomic<bool> system_tried{false};
std::atomic<const OpenMP*> current{nullptr};
std::atomic<unsigned long long> scanned_at{0};  // libraries ever loaded, as of the last scan

struct LoadedLibraries {
  unsigned long long ever_loaded = 0;
  std::vector<std::string> openmp_paths;
};

bool is_openmp_path(const char* path) {
  const char* slash = std::strrchr(path, '/');
  const char* name = slash ? slash + 1 : path;
  for (const char* stem : {"libgomp", "libomp", "libiomp5"}) {
    const std::size_t length = std::strlen(stem);
    // "libgomp-a34b3233.so.1.0.0" is how wheels rename their copies.
    if (std::strncmp(name, stem, length) == 0 && (name[length] == '.' || name[length] == '-'))
      return true;
  }
  return false;
}

// Only collects: the loader holds a lock during the callback under which dlopen could deadlock.
int collect_library(dl_phdr_info* info, std::size_t, void* result) {
  auto& loaded = *static_cast<LoadedLibraries*>(result);
  loaded.ever_loaded = info->dlpi_adds;
  if (info->dlpi_name && is_openmp_path(info->dlpi_name))
    loaded.openmp_paths.emplace_back(info->dlpi_name);
  return 0;
}

unsigned long long libraries_ever_loaded() {
  unsigned long long adds = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* result) {
        *static_cast<unsigned long long*>(result) = info->dlpi_adds;
        return 1;  // the first library tells it
      },
      &adds);
  return adds;
}

template <class Function>
bool resolve(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  return function != nullptr;
}

/// The runtime that `library` gives, kept loaded from now on; null if it lacks an entry point
/// (libgomp of GCC 4.8, offload plugins).
const OpenMP* runtime_of(void* library) {
  OpenMP found{};
  if (!resolve(library, "GOMP_parallel", found.parallel) ||
      !resolve(library, "omp_get_thread_num", found.thread_num) ||
      !resolve(library, "omp_get_num_threads", found.num_threads) ||
      !resolve(library, "omp_get_max_threads", found.max_threads) ||
      !resolve(library, "omp_in_parallel", found.in_parallel))
    return nullptr;
  for (const OpenMP* runtime = known; runtime; runtime = runtime->next)
    if (runtime->parallel == found.parallel) return runtime;
  Dl_info where{};
  if (dladdr(reinterpret_cast<void*>(found.parallel), &where) && where.dli_fname) {
    found.path = where.dli_fname;
    dlopen(where.dli_fname, RTLD_NOLOAD | RTLD_NOW);  // a reference that is never given back
  }
  found.next = known;
  known = new OpenMP(std::move(found));
  return known;
}

const OpenMP* choose(const std::vector<std::string>& paths) {
  // What libraries loaded from now on would bind to: a preloaded runtime, or torch's, which torch
  // puts into the global scope.
  if (const OpenMP* global = runtime_of(RTLD_DEFAULT)) return global;
  for (const std::string& path : paths) {
    void* library = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_NOW);
    if (!library) continue;
    const OpenMP* runtime = runtime_of(library);
    dlclose(library);
    if (runtime && runtime != system_openmp) return runtime;
  }
  return system_openmp;
}

void open_system_openmp() {
  open_error = new std::string;
  for (const char* name : system_libraries) {
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library) {
      system_openmp = runtime_of(library);
      if (system_openmp) return;
      dlclose(library);
    }
    const char* reason = library ? "no GOMP_parallel" : dlerror();
    *open_error += (open_error->empty() ? "" : "; ") + std::string(name) + ": " +
                   (reason ? reason : "unknown error");
  }
}

}  // namespace

const OpenMP* find_openmp(bool open_system) {
  if (libraries_ever_loaded() == scanned_at.load(std::memory_order_acquire)) {
    const OpenMP* runtime = current.load(std::memory_order_acquire);
    if (runtime || !open_system || system_tried.load(std::memory_order_acquire)) return runtime;
  }
  const std::lock_guard<std::mutex> lock(scan_mutex);
  LoadedLibraries loaded;
  dl_iterate_phdr(collect_library, &loaded);
  const OpenMP* runtime = choose(loaded.openmp_paths);
  if (!runtime && open_system && !system_tried.load(std::memory_order_relaxed)) {
    open_system_openmp();
    runtime = system_openmp;
    system_tried.store(true, std::memory_order_release);
  }
  current.store(runtime, std::memory_order_release);
  scanned_at.store(loaded.ever_loaded, std::memory_order_release);
  return runtime;
}

std::string openmp_open_error() {
  const std::lock_guard<std::mutex> lock(scan_mutex);
  return open_error ? *open_error : std::string();
}

void reset_openmp_lock() { new (&scan_mutex) std::mutex; }

}  // namespace fusedstep::cpu
