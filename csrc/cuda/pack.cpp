#include "cuda/pack.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "cuda/walk.hpp"
#include "rules/rules.hpp"

namespace fusedstep::cuda {
namespace {

constexpr std::size_t word = sizeof(std::uint64_t);

template <class T>
void put(std::vector<std::uint64_t>& part, std::size_t begin, const T& record) {
  static_assert(alignof(T) <= word);
  std::memcpy(reinterpret_cast<unsigned char*>(part.data()) + begin, &record, sizeof record);
}

void resize(std::vector<std::uint64_t>& part, std::size_t bytes) {
  part.assign((bytes + word - 1) / word, 0);
}

bool is_wide(const Tensor& tensor) { return tensor.param_dtype == DType::float64; }

// --- one tensor -------------------------------------------------------------------------------

template <class... All>
int slots_of(RuleList<All...> /*rules*/, int rule) {
  static constexpr int slots[] = {num_slots<All>...};
  return slots[rule];
}

/// Of the state that the rule of a tensor has, whatever else there is.
template <class Visit>
void for_each_slot(const Tensor& tensor, int slots, Visit visit) {
  for (int s = 0; s < slots; ++s) visit(tensor.slots[s]);
}

bool has_blocks(const Tensor& tensor, int slots) {
  bool blocks = false;
  for_each_slot(tensor, slots,
                [&](const Slot& slot) { blocks = blocks || slot.dtype == DType::int8_blocks; });
  return blocks;
}

/// Which kernel a tensor alone would take.
Access access_of(const Tensor& tensor, int slots) {
  if (tensor.layout || has_blocks(tensor, slots)) return Access::any;
  bool uniform = !tensor.copy && tensor.grad_dtype == tensor.param_dtype;
  for_each_slot(tensor, slots,
                [&](const Slot& slot) { uniform = uniform && slot.dtype == tensor.param_dtype; });
  if (is_wide(tensor)) return uniform ? Access::float64 : Access::any;
  return uniform && tensor.param_dtype == DType::float32 ? Access::float32 : Access::mixed;
}

/// Which kernel takes what both take.
Access both(Access a, Access b) {
  if (a == b) return a;
  const auto narrow = [](Access x) { return x == Access::float32 || x == Access::mixed; };
  return narrow(a) && narrow(b) ? Access::mixed : Access::any;
}

std::uint8_t shift_of(const Tensor& tensor, int slots) {
  Address buffers[3 + max_slots];
  int count = 0;
  const auto add = [&](const void* data, DType dtype) {
    if (data) buffers[count++] = {reinterpret_cast<std::uintptr_t>(data), size_of(dtype)};
  };
  add(tensor.param, tensor.param_dtype);
  if (!tensor.layout) add(tensor.grad, tensor.grad_dtype);
  add(tensor.copy, tensor.copy_dtype);
  for_each_slot(tensor, slots, [&](const Slot& slot) { add(slot.data, slot.dtype); });
  return static_cast<std::uint8_t>(best_shift(buffers, count, is_wide(tensor) ? 2 : 4));
}

TensorRecord record_of(const Tensor& tensor, int slots) {
  TensorRecord record{};
  record.param = tensor.param;
  record.copy = tensor.copy;
  for (int s = 0; s < slots; ++s) {
    record.slots[s] = tensor.slots[s].data;
    record.slot_dtypes[s] = tensor.slots[s].dtype;
  }
  record.numel = tensor.numel;
  record.row = tensor.row;
  record.scope = tensor.scope;
  record.param_dtype = tensor.param_dtype;
  record.grad_dtype = tensor.grad_dtype;
  record.copy_dtype = tensor.copy_dtype;
  record.blocks = has_blocks(tensor, slots);
  record.shift = shift_of(tensor, slots);
  return record;
}

bool needs_extra(const Tensor& tensor) {
  for (const Slot& slot : tensor.slots)
    if (slot.aux) return true;
  return tensor.layout || tensor.chunk_sums;
}

// --- the parts --------------------------------------------------------------------------------

void count_chunks(const DeviceCall& call, std::vector<std::uint32_t>& chunks) {
  chunks.assign(1, 0);
  std::int64_t total = 0;
  for (std::int64_t t = 0; t < call.step.num_tensors; ++t) {
    total += (call.step.tensors[t].numel + chunk_size - 1) / chunk_size;
    if (total > std::numeric_limits<std::int32_t>::max())
      throw std::length_error("more elements than one step can update on a GPU (3.5e13)");
    chunks.push_back(static_cast<std::uint32_t>(total));
  }
}

void pack_rows(const DeviceCall& call, Packed& out) {
  std::vector<RowRecord> rows(out.table.num_rows);
  for (std::uint32_t r = 0; r < out.table.num_rows; ++r) {
    std::memset(static_cast<void*>(&rows[r]), 0, sizeof(RowRecord));  // with its gaps
    rows[r].row = call.step.rows[r];
    if (call.rows) rows[r].device = call.rows[r];
    if (!call.rows) rows[r].device.advances = true;
    // What is not read must not change from step to step: it would be sent again.
    const DeviceRow& device = rows[r].device;
    if (device.from || device.step.data) rows[r].row.progress.step = 0;
    if (device.from || device.product.data) rows[r].row.progress.product = 1.0;
  }
  for (std::int64_t t = 0; t < call.step.num_tensors; ++t) {
    if (call.only_sum) break;
    RowRecord& row = rows[call.step.tensors[t].row];
    row.scope = call.step.tensors[t].scope;
    row.used = true;
  }
  out.rule = rows.empty() ? -1 : rows[0].row.rule;
  for (std::uint32_t r = 0; r < out.table.num_rows; ++r) {
    if (rows[r].row.rule != out.rule) out.rule = -1;
    put(out.parts[0], r * sizeof(RowRecord), rows[r]);
  }
}

void pack_scopes(const DeviceCall& call, Packed& out) {
  const Tensor* const tensors = call.step.tensors;
  std::int64_t t = 0;
  for (std::uint32_t k = 0; k < out.table.num_scopes; ++k) {
    ScopeRecord scope{};
    const double* const given = call.step.given_norms;
    scope.given = given ? given[call.step.joint ? 0 : k] : 0.0;
    const std::int64_t first = t;
    scope.tensor = static_cast<std::uint32_t>(t);
    scope.row = call.scope_rows ? call.scope_rows[k] : 0;
    for (; t < call.step.num_tensors && tensors[t].scope == k; ++t) {
      const DType grad = tensors[t].grad_dtype;
      scope.wide = scope.wide || (tensors[t].layout ? is_wide(tensors[t]) : grad == DType::float64);
    }
    out.wide = out.wide || scope.wide;
    const std::uint32_t chunks =
        out.chunks[static_cast<std::size_t>(t)] - out.chunks[static_cast<std::size_t>(first)];
    out.large_trees = out.large_trees || chunks > norm_tree::tile_size;
    put(out.parts[0], out.table.scopes_begin() + k * sizeof(ScopeRecord), scope);
  }
}

/// Appends a layout; returns where it begins, in words.
std::int64_t append(const GradLayout& layout, std::vector<std::uint64_t>& part) {
  const auto begin = static_cast<std::int64_t>(part.size());
  const auto add = [&](std::int64_t x) { part.push_back(static_cast<std::uint64_t>(x)); };
  add(static_cast<std::int64_t>(layout.source));
  add(layout.ndim);
  for (int d = 0; d < layout.ndim; ++d) add(layout.shape[d]);
  for (int d = 0; d < layout.ndim; ++d) add(layout.strides[d]);
  return begin;
}

ExtraRecord extra_of(const Tensor& tensor, std::vector<std::uint64_t>& part) {
  ExtraRecord extra{};
  for (int s = 0; s < max_slots; ++s) extra.aux[s] = tensor.slots[s].aux;
  extra.chunk_sums = tensor.chunk_sums;
  extra.layout = tensor.layout ? append(*tensor.layout, part) : -1;
  return extra;
}

void pack_tensors(const DeviceCall& call, Packed& out) {
  const Table& table = out.table;
  for (std::size_t k = 0; k < out.chunks.size(); ++k)
    put(out.parts[2], k * sizeof(std::uint32_t), out.chunks[k]);
  for (std::uint32_t t = 0; t < table.num_tensors; ++t) {
    const Tensor& tensor = call.step.tensors[t];
    // Of a sum alone there are no rows, and gradients are all that is read.
    const int slots = call.only_sum ? 0 : slots_of(Rules{}, call.step.rows[tensor.row].rule);
    const Access access = access_of(tensor, slots);
    out.access = t == 0 ? access : both(out.access, access);
    put(out.parts[1], t * sizeof(void*), tensor.grad);
    put(out.parts[2], table.tensors_begin() + t * sizeof(TensorRecord), record_of(tensor, slots));
    if (!table.has_extras) continue;
    const ExtraRecord extra = extra_of(tensor, out.parts[2]);  // appends a layout
    put(out.parts[2], table.extras_begin() + t * sizeof(ExtraRecord), extra);
  }
}

}  // namespace

void pack(const DeviceCall& call, Packed& out) {
  Table& table = out.table;
  table = {};
  table.num_rows = static_cast<std::uint32_t>(call.step.num_rows);
  table.num_scopes = static_cast<std::uint32_t>(call.step.num_scopes);
  table.num_tensors = static_cast<std::uint32_t>(call.step.num_tensors);
  for (std::uint32_t t = 0; t < table.num_tensors; ++t)
    table.has_extras = table.has_extras || needs_extra(call.step.tensors[t]);
  out.wide = out.large_trees = false;
  out.access = Access::any;
  count_chunks(call, out.chunks);
  resize(out.parts[0], table.rows_size());
  resize(out.parts[1], table.grads_size());
  resize(out.parts[2], table.layouts_begin());
  pack_rows(call, out);
  pack_scopes(call, out);
  pack_tensors(call, out);
  if (out.rule < 0) out.access = Access::any;
}

}  // namespace fusedstep::cuda
