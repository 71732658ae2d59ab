#pragma once
#include <pybind11/pybind11.h>

#include <mutex>
#include <string>
#include <vector>

#include "bindings/buffer.hpp"
#include "bindings/stream.hpp"
#include "core/device.hpp"

/// The module fusedstep._cuda, loaded when the first array on a device is met, and what it gives
/// out, as objects that give it back.
namespace fusedstep::bindings {

/// A device that can be used, and the functions that reach it.
struct Gpu {
  const DeviceApi* api = nullptr;
  int id = 0;

  explicit operator bool() const { return api != nullptr; }
  bool operator==(const Gpu& o) const { return api == o.api && id == o.id; }
  bool operator!=(const Gpu& o) const { return !(*this == o); }

  /// Raises RuntimeError if a function of the table has said why nothing was done.
  void check(const char* why) const;

  bool is_capturing(const Stream& stream) const;
  /// Waits for all streams, without the GIL.
  void synchronize() const;
  /// Waits; refuses to while the stream is being captured. `what` names what is read.
  void copy_out(const Stream& stream, const char* what, void* to, const void* from,
                std::int64_t bytes) const;
  void copy_in(const Stream& stream, const char* what, void* to, const void* from,
               std::int64_t bytes) const;
};

/// The device of an array at `place`. Raises RuntimeError that says what is missing.
Gpu find_gpu(const Device& device, const Place& place);

/// Refuses what cannot be done while a stream is being captured.
void refuse_capture(const Gpu& gpu, const Stream& stream, const std::string& what);

/// What one sequence of steps keeps on a device. Steps of several threads take turns.
class Workspace {
 public:
  explicit Workspace(const Gpu& gpu);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  /// What functions without an object use: one for each device and stream, for good.
  static Workspace& of_functions(const Gpu& gpu, const Stream& stream);

  const Gpu& gpu() const { return gpu_; }
  /// Puts a step into its stream and returns its report.
  void* step(const DeviceCall& call);
  /// A captured graph uses it from now on, longer than anybody here knows.
  void keep_for_good() { kept_ = true; }

 private:
  Gpu gpu_;
  void* handle_ = nullptr;
  bool kept_ = false;
  std::mutex turn_;
};

/// The report of one step.
class Report {
 public:
  Report(const Gpu& gpu, void* handle) : gpu_(gpu), handle_(handle) {}
  ~Report() { gpu_.api->free_report(handle_); }
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;

  /// Waits for the step, which is in the stream, without the GIL.
  DeviceReport read(const Stream& stream, double* tensor_norms);
  const Gpu& gpu() const { return gpu_; }

 private:
  Gpu gpu_;
  void* handle_;
  std::mutex turn_;
};

/// Memory of a device, zeroed, for things that live as long as this.
class Arena {
 public:
  explicit Arena(const Gpu& gpu) : gpu_(gpu) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// Aligned to `align` bytes, a power of two of at most 256.
  void* allocate(std::int64_t bytes, std::int64_t align);
  void keep_for_good() { kept_ = true; }

 private:
  Gpu gpu_;
  std::vector<void*> blocks_;
  std::int64_t used_ = 0, size_ = 0;  ///< of the last block
  bool kept_ = false;
};

}  // namespace fusedstep::bindings
