#include "cuda/arguments.hpp"
#include "cuda/kernels.hpp"
#include "cuda/settle.hpp"

namespace fusedstep::cuda {
namespace {

/// The chunk sum. Squares of float64 elements that are not 0 may all be 0, which somebody has to
/// know.
__device__ __forceinline__ double measure_chunk(const Step& step, const GradChunk& grad) {
  const double sum = sum_chunk<far_ahead>(grad);
  if (grad.dtype != DType::float64 || sum != 0 || step.only_sum) return sum;
  for (int i = static_cast<int>(threadIdx.x); i < grad.count; i += threads) {
    if (element(grad, i) == 0) continue;
    atomicAdd(&step.control->underflow, 1u);
    break;
  }
  return sum;
}

/// The sum of one chunk per block, and by the last block everything that follows from the sums.
__global__ void __launch_bounds__(threads, 5) measure(const __grid_constant__ Arguments arguments) {
  const Step& step = arguments.step;
  const Table table = table_of(arguments);
  const std::uint32_t chunk = blockIdx.x;
  if (step.measures && chunk < step.num_chunks) {
    const std::uint32_t t = tensor_of(table, chunk);
    double* const own = table.chunk_sums(t);
    const std::uint32_t k = chunk - table.first_chunks()[t];
    const bool known = step.sums == StepCall::Sums::of_gradients;
    const double sum = known ? own[k] : measure_chunk(step, grad_of(table, chunk));
    if (threadIdx.x == 0) {
      step.chunk_sums[chunk] = sum;
      if (own && !known) own[k] = sum;
    }
  }
  if (step.only_chunks) return;
  if (is_last_block(step.control)) settle(step, table);
}

__global__ void upload(const __grid_constant__ Upload data) {
  for (std::uint32_t i = threadIdx.x; i < data.count; i += threads)
    data.to[data.places[i]] = data.words[i];
}

}  // namespace

Kernel measure_kernel() { return measure; }
UploadKernel upload_kernel() { return upload; }

Kernel update_kernel(int rule, Access access) {
  static_assert(num_shards == 4);
  if (access == Access::any) return kernel_of_shard<num_shards>(rule, access);
  switch (rule % num_shards) {
    case 0: return kernel_of_shard<0>(rule, access);
    case 1: return kernel_of_shard<1>(rule, access);
    case 2: return kernel_of_shard<2>(rule, access);
    default: return kernel_of_shard<3>(rule, access);
  }
}

}  // namespace fusedstep::cuda
