#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/runtime.hpp"
#include "cuda/table.hpp"

namespace fusedstep::cuda {

/// What a report needs of the device: a header, scales of the scopes, norms of the tensors, and the
/// chunk sums, from which the host makes norms of tensors when it is asked for them.
class ReportMemory {
 public:
  ReportMemory(std::size_t scopes, std::size_t tensors, std::size_t chunks)
      : memory_(bytes(scopes, tensors, chunks)),
        scopes_(scopes),
        tensors_(tensors),
        chunks_(chunks) {}

  /// All zero, in the order of the stream, or when it returns.
  void clear(cudaStream_t stream) const {
    check(cudaMemsetAsync(header(), 0, memory_.size(), stream), "cudaMemsetAsync");
  }
  void clear() const { memory_.clear(); }

  bool fits(std::size_t scopes, std::size_t tensors, std::size_t chunks) const {
    return scopes <= scopes_ && tensors <= tensors_ && chunks <= chunks_;
  }
  DeviceReport* header() const { return memory_.as<DeviceReport>(); }
  double* scope_scales() const { return reinterpret_cast<double*>(header() + 1); }
  double* tensor_norms() const { return scope_scales() + scopes_; }
  double* chunk_sums() const { return tensor_norms() + tensors_; }

 private:
  static std::size_t bytes(std::size_t scopes, std::size_t tensors, std::size_t chunks) {
    return sizeof(DeviceReport) + (scopes + tensors + chunks) * sizeof(double);
  }
  Memory memory_;
  std::size_t scopes_, tensors_, chunks_;
};

/// Memory of reports that nobody holds any more, for those to come. A report can be given back
/// before its step has run: the next one runs after it.
class ReportPool {
 public:
  explicit ReportPool(int device) : device_(device) {}
  ~ReportPool();

  int device() const { return device_; }
  std::unique_ptr<ReportMemory> take(std::size_t scopes, std::size_t tensors, std::size_t chunks,
                                     cudaStream_t stream);
  void give_back(std::unique_ptr<ReportMemory> memory);

 private:
  int device_;
  std::mutex mutex_;  // reports are dropped by any thread
  std::vector<std::unique_ptr<ReportMemory>> free_;
};

/// One step's report, on its way or there.
class Report {
 public:
  Report(std::shared_ptr<ReportPool> pool, std::unique_ptr<ReportMemory> memory, bool wide)
      : pool_(std::move(pool)), memory_(std::move(memory)), wide_(wide) {}
  ~Report();
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;

  const ReportMemory& memory() const { return *memory_; }
  /// A graph that may be replayed at any time writes into it.
  void keep_for_good() { captured_ = true; }
  void set_tensors(std::vector<std::uint32_t> chunks, std::vector<std::uint32_t> scopes) {
    chunks_ = std::move(chunks);
    scopes_ = std::move(scopes);
  }

  void read(cudaStream_t stream, DeviceReport& out, double* tensor_norms) const;

 private:
  void read_tensor_norms(cudaStream_t stream, double* out) const;
  template <class T>
  static std::vector<T> fetch(cudaStream_t stream, const T* from, std::size_t count);

  std::shared_ptr<ReportPool> pool_;
  std::unique_ptr<ReportMemory> memory_;
  bool wide_;  ///< the device has made the norms of the tensors itself
  bool captured_ = false;
  std::vector<std::uint32_t> chunks_;  ///< first one of each tensor, and their number
  std::vector<std::uint32_t> scopes_;  ///< of each tensor
};

}  // namespace fusedstep::cuda
