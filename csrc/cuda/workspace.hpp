#pragma once
#include <memory>
#include <vector>

#include "cuda/pack.hpp"
#include "cuda/report.hpp"

namespace fusedstep::cuda {

/// Device memory that grows. What a captured graph may use is never given back before the end.
class Buffer {
 public:
  /// Makes room; whether it had to grow, and lost what was in it. New memory is not cleared.
  bool reserve(std::size_t bytes, bool keep_old) {
    if (bytes <= memory_.size()) return false;
    Memory larger(bytes + bytes / 2);
    if (keep_old) old_.push_back(std::move(memory_));
    memory_ = std::move(larger);
    return true;
  }
  template <class T>
  T* as() const {
    return memory_.as<T>();
  }

 private:
  Memory memory_;
  std::vector<Memory> old_;
};

/// A part of a table in device memory, and what was last sent there.
class SentPart {
 public:
  /// Brings it up to date, in the order of the stream; returns where it is.
  const unsigned char* send(const std::vector<std::uint64_t>& words, bool keep_old,
                            cudaStream_t stream);

 private:
  void send_range(const std::vector<std::uint64_t>& words, std::size_t first, std::size_t last,
                  cudaStream_t stream);

  Buffer buffer_;
  std::vector<std::uint64_t> sent_;
};

/// What belongs to one sequence of steps. See DeviceApi.
class Workspace {
 public:
  explicit Workspace(int device) : device_(device), pool_(std::make_shared<ReportPool>(device)) {}
  ~Workspace();

  /// Puts a step into its stream.
  std::unique_ptr<Report> step(const DeviceCall& call);

 private:
  void place_tables(cudaStream_t stream, bool capturing);
  const unsigned char* captured_part(const std::vector<std::uint64_t>& words);
  void place_scratch();
  std::unique_ptr<Report> make_report(const DeviceCall& call, bool capturing);
  void describe(const DeviceCall& call, const Report& report);
  void launch_kernels(const DeviceCall& call, cudaStream_t stream);

  int device_;
  std::shared_ptr<ReportPool> pool_;
  Memory control_;
  Buffer constants_, trees_, norms_, scratch_;
  SentPart rows_, grads_, slow_;
  std::vector<Memory> captured_;  ///< tables of graphs
  bool was_captured_ = false;
  Packed packed_;
  Arguments arguments_;
};

}  // namespace fusedstep::cuda
