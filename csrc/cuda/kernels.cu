// The update kernels. Compiled num_shards + 1 times, side by side, as all of them take minutes:
// FUSEDSTEP_SHARD says which part of the list of rules this is. The last part is the kernel for any
// rules and forms at once.
#include <utility>

#include "cuda/arguments.hpp"
#include "cuda/kernels.hpp"
#include "cuda/update.hpp"

namespace fusedstep::cuda {
namespace {

/// Blocks per multiprocessor that there are registers for, at least: as many as do without
/// spilling on any architecture (tests/test_cuda_source.py). [state buffers][access]
[[maybe_unused]] constexpr int blocks_by_need[max_slots + 1][3] = {
    {8, 8, 6}, {6, 5, 4}, {5, 4, 4}, {5, 4, 4}};

template <class Rule>
constexpr int blocks_for(Tag<Rule> /*rule*/, Access access) {
  return blocks_by_need[num_slots<Rule>][static_cast<int>(access)];
}
template <class... All>
constexpr int blocks_for(RuleList<All...> /*rules*/, Access /*any*/) {
  return 4;
}

/// Updates the elements of a chunk.
template <class Rule, Access access>
__device__ __forceinline__ void update_chunk(const Step& step, const Table& table,
                                             const RowConstants& constants, std::uint32_t t,
                                             std::uint32_t chunk) {
  const Buffers at = buffers_of<num_slots<Rule>>(table, t, chunk);
  if constexpr (access == Access::any) update_any<Rule>(constants, table.tensor(t), at);
  if constexpr (access == Access::float32) update_by_vectors<Uniform<float>, Rule>(constants, at);
  if constexpr (access == Access::float64) update_by_vectors<Uniform<double>, Rule>(constants, at);
  if constexpr (access == Access::mixed) update_by_vectors<Mixed, Rule>(constants, at);
  // Only of such rules (workspace.cu): it would be half of the code of every kernel.
  if constexpr (num_slots<Rule> == 0) {
    if (step.sums == StepCall::Sums::of_results) report_sum<access>(table, t, at);
  }
}

/// One chunk per block. `Rows` is Tag<Rule> or the list of rules.
template <class Rows, Access access>
__device__ __forceinline__ void update_one_chunk(Rows rules, const Step& step, const Table& table) {
  __shared__ RowConstants prepared;
  const std::uint32_t chunk = step.backward ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const std::uint32_t t = tensor_of(table, chunk), row = table.tensor(t).row;
  const RowRecord& record = table.row(row);
  if (!step.settled) {
    if (threadIdx.x == 0) prepare_row(rules, record, step.grad_scale, 0.0, prepared);
    __syncthreads();
  }
  const RowConstants& constants = step.settled ? step.constants[row] : prepared;
  for_rule(rules, record.row.rule, [&](auto tag) {
    using Rule = typename decltype(tag)::type;
    update_chunk<Rule, access>(step, table, constants, t, chunk);
  });
}

/// What the first kernel would have done, if there had been one.
template <class Rows>
__device__ __forceinline__ void settle_without_norms(Rows rules, const Step& step,
                                                     const Table& table, bool skipped) {
  if (threadIdx.x == 0) {
    DeviceReport report{};
    report.norm = static_cast<double>(NAN);
    report.first_nonfinite = -1;
    report.skipped = skipped;
    *step.report = report;
  }
  prepare_rows(rules, step, table);
}

template <class Rows, Access access>
__global__ void __launch_bounds__(threads, blocks_for(Rows{}, access))
    update(const __grid_constant__ Arguments arguments) {
  const Step& step = arguments.step;
  const Table table = table_of(arguments);
  const bool skipped = step.settled ? step.control->skipped != 0 : overflow_found(step);
  if (!skipped) update_one_chunk<Rows, access>(Rows{}, step, table);
  if (!is_last_block(step.control)) return;
  if (!step.settled) settle_without_norms(Rows{}, step, table, skipped);
  finish_rows(step, table, skipped);
}

// --- which of them are compiled here ----------------------------------------------------------

template <class Rule>
Kernel kernel_of(Access access) {
  switch (access) {
    case Access::float32: return update<Tag<Rule>, Access::float32>;
    case Access::float64: return update<Tag<Rule>, Access::float64>;
    default: return update<Tag<Rule>, Access::mixed>;
  }
}

/// `own`: the rule belongs to this shard.
template <class Rule, bool own>
void consider(bool wanted, Access access, Kernel& found) {
  if constexpr (own) {
    if (wanted) found = kernel_of<Rule>(access);
  }
}

template <class... All, int... index>
Kernel find(RuleList<All...> /*rules*/, std::integer_sequence<int, index...> /*indices*/, int rule,
            Access access) {
  Kernel found = nullptr;
  (consider<All, index % num_shards == FUSEDSTEP_SHARD>(index == rule, access, found), ...);
  return found;
}

/// `own`: this is the last shard.
template <class All, bool own>
Kernel kernel_of_all() {
  if constexpr (own) return update<All, Access::any>;
  return nullptr;
}

}  // namespace

template <>
Kernel kernel_of_shard<FUSEDSTEP_SHARD>(int rule, Access access) {
  constexpr bool is_last = FUSEDSTEP_SHARD == num_shards;
  if (is_last) return kernel_of_all<Rules, is_last>();
  return find(Rules{}, std::make_integer_sequence<int, Rules::size>{}, rule, access);
}

}  // namespace fusedstep::cuda
