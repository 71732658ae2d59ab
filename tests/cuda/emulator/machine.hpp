#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"

/// What all functions of the runtime share.
namespace emulator {

struct Settings {
  std::int64_t order = 0, seed = 1, workers = 1, streams = 0;
  std::int64_t devices = 1, driver_version = 13000, capability = 90;
  std::int64_t multiprocessors = 4, blocks_per_multiprocessor = 2, memory = std::int64_t{8} << 30;
};

/// An error that a test has ordered.
struct Ordered {
  std::int64_t calls_left;
  cudaError_t error;
};

/// Guarded by its mutex, which every function of the runtime holds while it runs.
struct Machine {
  std::recursive_mutex mutex;
  Settings settings;
  std::map<std::string, std::int64_t> calls;
  std::map<std::string, Ordered> ordered;
  std::vector<std::string> launched, executed;
  std::int64_t bytes_copied = 0, bytes_set = 0, kernel_errors = 0;
  cudaError_t broken = cudaSuccess;  ///< by a kernel: every later call says so
  std::string fault;                 ///< the first; empty if there was none

  /// Counts a call; the error that a test has ordered for it.
  cudaError_t count(const char* function);
  /// Remembers and prints what was done wrong.
  void blame(const std::string& what);
};
Machine& machine();

/// What every thread of the host has for itself.
struct HostThread {
  int device = 0;
  cudaError_t last_error = cudaSuccess;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
};
HostThread& host_thread();

/// The frame of every function of the runtime: counts, refuses, remembers errors.
template <class Body>
cudaError_t call(const char* function, Body body) {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  cudaError_t error = machine().count(function);
  if (error == cudaSuccess) error = machine().broken;
  if (error == cudaSuccess && machine().settings.driver_version == 0)
    error = cudaErrorInsufficientDriver;
  if (error == cudaSuccess && machine().settings.devices == 0) error = cudaErrorNoDevice;
  if (error == cudaSuccess) error = body();
  if (error != cudaSuccess) host_thread().last_error = error;
  return error;
}

// --- memory.cpp ---
/// Whether the bytes lie in one allocation or registration of the device (-1: of any).
bool is_device_memory(const void* memory, std::size_t bytes, int device = -1);
std::int64_t count_memory(const std::string& what);

// --- streams.cpp ---
void run_everything();
void forget_streams();
std::int64_t count_pending();
/// Whether this thread must not call what a capture could not see; such a call ends the capture.
bool is_forbidden_while_capturing();

// --- symbols.cpp ---
std::string name_of_function(const void* function);

}  // namespace emulator
