#pragma once
#include <memory>
#include <vector>

#include "cuda/pack.hpp"
#include "cuda/report.hpp"

namespace fusedstep::cuda {

/// Device memory that grows.
class Buffer {
 public:
  /// Makes room; whether it had to grow, and lost what was in it. New memory is not cleared.
  bool reserve(std::size_t bytes) {
    if (bytes <= memory_.size()) return false;
    memory_ = Memory(bytes + bytes / 2);
    return true;
  }
  template <class T>
  T* as() const {
    return memory_.as<T>();
  }

 private:
  Memory memory_;
};

/// A part of a table in device memory, and what was last sent there.
class SentPart {
 public:
  /// Brings it up to date, in the order of the stream; returns where it is.
  const unsigned char* send(const std::vector<std::uint64_t>& words, cudaStream_t stream);

 private:
  Buffer buffer_;
  std::vector<std::uint64_t> sent_;
  bool complete_ = false;  ///< else what is there is not known
};

/// What the kernels of a step write and read again.
class Scratch {
 public:
  /// Puts its addresses into a step, for which there is room then.
  void place(Step& step);

 private:
  Memory control_;
  Buffer constants_, trees_, norms_, values_;
};

/// What a captured graph has for itself: it may be replayed beside anything else.
struct OfGraph {
  Scratch scratch;
  std::vector<Memory> tables;
};

/// What belongs to one sequence of steps. See DeviceApi.
class Workspace {
 public:
  explicit Workspace(int device) : device_(device), pool_(std::make_shared<ReportPool>(device)) {}
  ~Workspace();

  /// Puts a step into its stream.
  std::unique_ptr<Report> step(const DeviceCall& call);

 private:
  void place_tables(OfGraph* graph, cudaStream_t stream);
  std::unique_ptr<Report> make_report(const DeviceCall& call, bool capturing);
  void describe(const DeviceCall& call, const Report& report);
  void launch_kernels(const DeviceCall& call, cudaStream_t stream);

  int device_;
  std::shared_ptr<ReportPool> pool_;
  Scratch scratch_;
  SentPart parts_[Table::num_parts];
  std::vector<std::unique_ptr<OfGraph>> graphs_;
  Packed packed_;
  Arguments arguments_;
};

}  // namespace fusedstep::cuda
