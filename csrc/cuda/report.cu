#include <cmath>

#include "core/norm_tree.hpp"
#include "core/norms.hpp"
#include "cuda/report.hpp"

namespace fusedstep::cuda {

ReportPool::~ReportPool() {
  try {
    const DeviceGuard guard(device_);
    free_.clear();
  } catch (const Error&) {  // the process ends, or the device is lost
  }
}

std::unique_ptr<ReportMemory> ReportPool::take(std::size_t scopes, std::size_t tensors,
                                               std::size_t chunks, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& memory : free_) {
    if (!memory->fits(scopes, tensors, chunks)) continue;
    std::swap(memory, free_.back());
    std::unique_ptr<ReportMemory> taken = std::move(free_.back());
    free_.pop_back();
    return taken;
  }
  auto made = std::make_unique<ReportMemory>(scopes, tensors, chunks);
  made->clear(stream);
  return made;
}

void ReportPool::give_back(std::unique_ptr<ReportMemory> memory) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(memory));
}

Report::~Report() {
  if (captured_) {
    static_cast<void>(memory_.release());  // the graph may live on
    return;
  }
  pool_->give_back(std::move(memory_));
}

template <class T>
std::vector<T> Report::fetch(cudaStream_t stream, const T* from, std::size_t count) {
  std::vector<T> values(count);
  check(cudaMemcpyAsync(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, stream),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return values;
}

void Report::read(cudaStream_t stream, DeviceReport& out, double* tensor_norms) const {
  const DeviceGuard guard(pool_->device());
  if (is_capturing(stream))
    throw std::runtime_error("what a step did cannot be read while its stream is being captured");
  // Graphs are replayed in any stream.
  if (captured_) check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  out = fetch(stream, memory_->header(), 1)[0];
  if (tensor_norms) read_tensor_norms(stream, tensor_norms);
}

void Report::read_tensor_norms(cudaStream_t stream, double* out) const {
  const std::size_t tensors = scopes_.size();
  if (tensors == 0) return;
  if (wide_) {
    const auto norms = fetch(stream, memory_->tensor_norms(), tensors);
    std::copy(norms.begin(), norms.end(), out);
    return;
  }
  const auto sums = fetch(stream, memory_->chunk_sums(), chunks_.back());
  const auto scales = fetch(stream, memory_->scope_scales(), scopes_.back() + std::size_t{1});
  for (std::size_t t = 0; t < tensors; ++t) {
    const double sum = norm_tree::sum_chunks(sums.data() + chunks_[t], chunks_[t + 1] - chunks_[t]);
    out[t] = plain_nan(scales[scopes_[t]] * std::sqrt(sum));
  }
}

}  // namespace fusedstep::cuda
