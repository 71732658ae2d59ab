#pragma once
#include "core/norms.hpp"
#include "cuda/rows.hpp"
#include "cuda/squares.hpp"

/// What one block does when all gradients have been read: norms, whether to update at all, the
/// coefficients of all rows, the report. The same decisions as cpu/step.cpp, from the same
/// functions of core/.
namespace fusedstep::cuda {

// --- which block ------------------------------------------------------------------------------

/// True in the block that comes here last; it sees everything that the others have written.
__device__ __forceinline__ bool is_last_block(Control* control) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // also for what the others wrote before the barrier
    last = atomicAdd(&control->finished, 1u) == gridDim.x - 1;
    if (last) control->finished = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// --- reductions over a block ------------------------------------------------------------------

/// The smallest by `less`, for all threads.
template <class Choose>
__device__ __forceinline__ double choose_in_block(double x, Choose choose) {
  __shared__ double of_warps[warps];
#pragma unroll
  for (int half = warp_size / 2; half >= 1; half /= 2)
    x = choose(x, __shfl_xor_sync(all_lanes, x, half));
  if (threadIdx.x % warp_size == 0) of_warps[threadIdx.x / warp_size] = x;
  __syncthreads();
  x = of_warps[0];
  for (int w = 1; w < warps; ++w) x = choose(x, of_warps[w]);
  __syncthreads();
  return x;
}

/// The larger one; NaN wins.
FUSEDSTEP_HD double larger_or_nan(double a, double b) { return a != a || a > b ? a : b; }

// --- gradients --------------------------------------------------------------------------------

__device__ __forceinline__ GradChunk grad_of(const Table& table, std::uint32_t chunk) {
  const std::uint32_t t = tensor_of(table, chunk);
  const TensorRecord& tensor = table.tensor(t);
  const LayoutRecord* const layout = table.layout(t);
  const std::int64_t begin = std::int64_t{chunk - table.first_chunks()[t]} * chunk_size;
  const std::int64_t left = tensor.numel - begin;
  const bool wide = tensor.param_dtype == DType::float64;
  const DType dtype = !layout ? tensor.grad_dtype : wide ? DType::float64 : DType::float32;
  const char* const data = static_cast<const char*>(table.grad(t));
  const auto skipped = layout ? 0 : begin * static_cast<std::int64_t>(size_of(dtype));
  return {data + skipped, layout, begin, dtype,
          static_cast<int>(left < chunk_size ? left : chunk_size)};
}

/// max|x| over chunks, NaN if any is NaN; for all threads.
__device__ __forceinline__ double max_abs(const Table& table, std::uint32_t first,
                                          std::uint32_t last) {
  double largest = 0;
  for (std::uint32_t chunk = first; chunk < last; ++chunk) {
    const GradChunk grad = grad_of(table, chunk);
    for (int i = static_cast<int>(threadIdx.x); i < grad.count; i += threads)
      largest = larger_or_nan(largest, ::fabs(element(grad, i)));
  }
  return choose_in_block(largest, larger_or_nan);
}

/// A second look, by one block alone: slow, but float64 gradients beyond 1e+-135 are rare. Where
/// the sums of the chunks go, `sums`, may be where those of the first look are.
__device__ __forceinline__ Tree look_again(const Step& step, const Table& table,
                                           std::uint32_t first, std::uint32_t last, double sum,
                                           double* sums) {
  const double largest = max_abs(table, first, last);
  if (largest == 0 || !is_finite(largest)) return {sum, largest, 1.0};
  const double scale = ::ldexp(1.0, -norm_tree::second_look_exponent(largest));
  for (std::uint32_t chunk = first; chunk < last; ++chunk) {
    const double scaled = sum_by_elements(grad_of(table, chunk), scale);
    if (threadIdx.x == 0) sums[chunk] = scaled;
  }
  __syncthreads();
  const double scaled = sum_by_block(sums + first, last - first, step.scratch);
  return {scaled, sqrt(scaled) / scale, scale};
}

// --- norms ------------------------------------------------------------------------------------

struct ChunkRange {
  std::uint32_t first, last;
};

__device__ __forceinline__ ChunkRange chunks_of_tree(const Step& step, const Table& table,
                                                     std::uint32_t k) {
  if (step.single_tree) return {0, step.num_chunks};
  const std::uint32_t end =
      k + 1 < table.num_scopes ? table.scope(k + 1).tensor : table.num_tensors;
  return {table.first_chunks()[table.scope(k).tensor], table.first_chunks()[end]};
}

__device__ __forceinline__ bool is_wide(const Step& step, const Table& table, std::uint32_t k) {
  return step.single_tree ? step.wide : table.scope(k).wide;
}

/// Small trees by a warp each, large ones by all.
__device__ __forceinline__ void sum_trees(const Step& step, const Table& table,
                                          std::uint32_t trees) {
  const double* const sums = step.chunk_sums;
  for (std::uint32_t k = threadIdx.x / warp_size; k < trees; k += warps) {
    const ChunkRange chunks = chunks_of_tree(step, table, k);
    const std::uint32_t count = chunks.last - chunks.first;
    if (count > norm_tree::tile_size) continue;
    const double sum = sum_by_warp(sums + chunks.first, count);
    if (threadIdx.x % warp_size == 0) step.trees[k] = {sum, sqrt(sum), 1.0};
  }
  for (std::uint32_t k = 0; k < trees; ++k) {
    const ChunkRange chunks = chunks_of_tree(step, table, k);
    const std::uint32_t count = chunks.last - chunks.first;
    if (count <= norm_tree::tile_size) continue;
    const double sum = sum_by_block(sums + chunks.first, count, step.scratch);
    if (threadIdx.x == 0) step.trees[k] = {sum, sqrt(sum), 1.0};
  }
  __syncthreads();
}

__device__ __forceinline__ void measure_trees(const Step& step, const Table& table,
                                              std::uint32_t trees) {
  sum_trees(step, table, trees);
  if (!step.wide || step.only_sum) return;
  for (std::uint32_t k = 0; k < trees; ++k) {
    const double sum = step.trees[k].sum;
    if (!is_wide(step, table, k) || !norm_tree::needs_second_look(sum)) continue;
    const ChunkRange chunks = chunks_of_tree(step, table, k);
    const Tree tree = look_again(step, table, chunks.first, chunks.last, sum, step.chunk_sums);
    if (threadIdx.x == 0) step.trees[k] = tree;
  }
  __syncthreads();
}

/// Of every tensor. Without float64 gradients the host does it from the chunk sums, if asked.
__device__ __forceinline__ void report_tensor_norms(const Step& step, const Table& table) {
  double* const sums = step.chunk_sums;
  double* const other_sums = step.scratch + scratch_of(step.num_chunks);
  for (std::uint32_t t = 0; t < table.num_tensors; ++t) {
    const std::uint32_t first = table.first_chunks()[t], last = table.first_chunks()[t + 1];
    const std::uint32_t scope = table.tensor(t).scope, k = step.single_tree ? 0 : scope;
    const double sum = sum_by_block(sums + first, last - first, step.scratch);
    const bool safe = !is_wide(step, table, k) || !norm_tree::needs_second_look(sum);
    const double norm = safe ? sqrt(sum) / step.trees[k].scale
                             : look_again(step, table, first, last, sum, other_sums).norm;
    if (threadIdx.x == 0) step.tensor_norms[t] = plain_nan(step.scope_scales[scope] * norm);
  }
}

/// The first tensor with inf or NaN, -1 if there is none.
__device__ __forceinline__ std::int64_t first_nonfinite(const Step& step, const Table& table) {
  const double none = static_cast<double>(step.num_chunks);
  for (std::uint32_t begin = 0; begin < step.num_chunks;) {
    const std::uint32_t mine = begin + threadIdx.x;
    const bool bad = mine < step.num_chunks && !is_finite(read_anew(step.chunk_sums + mine));
    const double found = choose_in_block(bad ? static_cast<double>(mine) : none,
                                         [](double a, double b) { return a < b ? a : b; });
    if (found == none) {
      begin += threads;
      continue;
    }
    // The squares of finite float64 elements may have overflowed.
    const auto chunk = static_cast<std::uint32_t>(found);
    if (!is_finite(max_abs(table, chunk, chunk + 1))) return tensor_of(table, chunk);
    begin = chunk + 1;
  }
  return -1;
}

// --- decisions --------------------------------------------------------------------------------

__device__ __forceinline__ bool overflow_found(const Step& step) {
  return step.found_inf.data && read_number(step.found_inf) != 0;
}

/// The norm of all scopes together from those in step.norms; by one thread.
__device__ __forceinline__ double joint_norm(const Step& step, std::uint32_t scopes) {
  return step.single_tree ? step.norms[0] : joined_norm(step.norms, scopes);
}

/// Fills norms and report; whether to skip.
__device__ __forceinline__ bool judge(const Step& step, const Table& table) {
  __shared__ DeviceReport shared;
  const std::uint32_t scopes = table.num_scopes;
  for (std::uint32_t k = threadIdx.x; k < scopes; k += threads) {
    const double scale = ::fabs(rescale_of(table.row(table.scope(k).row), step.grad_scale));
    step.scope_scales[k] = scale;
    if (step.measures) step.norms[k] = plain_nan(scale * step.trees[step.single_tree ? 0 : k].norm);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    DeviceReport report{};
    report.norm = static_cast<double>(NAN);
    report.sum = step.measures ? step.trees[0].sum : 0.0;
    report.first_nonfinite = -1;
    bool finite = true;
    if (step.measures) {
      report.norm = joint_norm(step, scopes);
      finite = is_finite(report.norm);
      report.nonfinite = !finite;  // of the gradients: asked below
    }
    shared = report;
  }
  __syncthreads();
  const bool nonfinite = shared.nonfinite;
  __syncthreads();  // all have read it
  const std::int64_t first = nonfinite ? first_nonfinite(step, table) : -1;
  if (threadIdx.x == 0) {
    DeviceReport report = shared;
    report.first_nonfinite = first;
    if (step.given) {
      for (std::uint32_t k = 0; k < scopes; ++k) {
        const double given =
            step.given_norm.data ? read_number(step.given_norm) : table.scope(k).given;
        step.norms[k] = plain_nan(step.scope_scales[k] * given);
      }
      report.norm = step.joint ? step.norms[0] : joint_norm(step, scopes);
      report.nonfinite = report.nonfinite || !is_finite(report.norm);
    } else if (step.measures && step.joint) {
      step.norms[0] = report.norm;
    }
    const bool known = step.measures || step.given;
    report.skipped = (known && exceeds(report.norm, step.skip_norm)) ||
                     (step.skip_nonfinite && report.nonfinite) || overflow_found(step);
    shared = report;
    *step.report = report;
    step.control->skipped = report.skipped;
  }
  __syncthreads();
  return shared.skipped;
}

template <class List>
__device__ __forceinline__ void prepare_rows(List rules, const Step& step, const Table& table) {
  const bool known = step.measures || step.given;
  for (std::uint32_t r = threadIdx.x; r < table.num_rows; r += threads) {
    const RowRecord& record = table.row(r);
    const double norm = known ? step.norms[step.joint ? 0 : record.scope] : 0.0;
    prepare_row(rules, record, step.grad_scale, norm, step.constants[r]);
  }
}

/// The last thing that a step does: its rows, which have been prepared, go on. Not before all
/// launches of the step have succeeded, so in the last one.
__device__ __forceinline__ void finish_rows(const Step& step, const Table& table, bool skipped) {
  __syncthreads();  // all rows have been read
  double clip = 1.0;
  for (std::uint32_t r = threadIdx.x; r < table.num_rows; r += threads) {
    const RowRecord& record = table.row(r);
    const RowConstants& constants = step.constants[r];
    if (record.used) clip = smaller_coefficient(clip, constants.clip_coefficient);
    advance_row(record, constants, !skipped);
  }
  clip = choose_in_block(clip, smaller_coefficient);
  if (threadIdx.x != 0) return;
  step.report->clip_coef = clip;
  if (step.counts) ++(skipped ? step.counts->skipped : step.counts->applied);
}

/// All of it.
__device__ __forceinline__ void settle(const Step& step, const Table& table) {
  const std::uint32_t trees = step.single_tree ? 1 : table.num_scopes;
  if (step.measures) measure_trees(step, table, trees);
  if (step.only_sum) {
    if (threadIdx.x == 0) step.report->sum = step.trees[0].sum;
    return;
  }
  const bool skipped = judge(step, table);
  if (step.measures && step.wide) report_tensor_norms(step, table);
  prepare_rows(Rules{}, step, table);
  if (step.num_chunks == 0) finish_rows(step, table, skipped);  // no update follows
}

}  // namespace fusedstep::cuda
