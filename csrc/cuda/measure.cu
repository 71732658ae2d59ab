#include "cuda/arguments.hpp"
#include "cuda/kernels.hpp"
#include "cuda/settle.hpp"

namespace fusedstep::cuda {
namespace {

/// Chunk sums, and by the last block everything that follows from them.
__global__ void __launch_bounds__(threads) measure(const __grid_constant__ Arguments arguments) {
  const Step& step = arguments.step;
  const Table table = table_of(arguments);
  const std::uint32_t chunks = step.measures ? step.num_chunks : 0;
  for (std::uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const std::uint32_t t = tensor_of(table, chunk);
    double* const own = table.chunk_sums(t);
    const std::uint32_t k = chunk - table.first_chunks()[t];
    const bool known = step.sums == StepCall::Sums::of_gradients;
    const double sum = known ? own[k] : sum_chunk(grad_of(table, chunk));
    if (threadIdx.x != 0) continue;
    step.report->chunk_sums[chunk] = sum;
    if (own && !known) own[k] = sum;
  }
  if (is_last_block(step.control)) settle(step, table);
}

__global__ void upload(const __grid_constant__ Upload data) {
  for (std::uint32_t i = threadIdx.x; i < data.count; i += threads) data.to[i] = data.words[i];
}

}  // namespace

Kernel measure_kernel() { return measure; }
UploadKernel upload_kernel() { return upload; }

}  // namespace fusedstep::cuda
