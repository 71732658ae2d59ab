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

Form form_of(const Tensor& tensor, int slots) {
  bool uniform = !tensor.copy && tensor.grad_dtype == tensor.param_dtype, blocks = false;
  for_each_slot(tensor, slots, [&](const Slot& slot) {
    uniform = uniform && slot.dtype == tensor.param_dtype;
    blocks = blocks || slot.dtype == DType::int8_blocks;
  });
  if (blocks) return Form::blocks;
  if (tensor.layout) return Form::single;
  const bool arithmetic =
      tensor.param_dtype == DType::float32 || tensor.param_dtype == DType::float64;
  return uniform && arithmetic ? Form::uniform : Form::mixed;
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
  record.form = form_of(tensor, slots);
  record.shift = shift_of(tensor, slots);
  return record;
}

bool needs_extra(const Tensor& tensor) {
  for (const Slot& slot : tensor.slots)
    if (slot.aux) return true;
  return tensor.layout || tensor.chunk_sums;
}

/// Which kernel a tensor alone would take.
Access access_of(const TensorRecord& record) {
  if (record.form == Form::mixed) return Access::mixed;
  if (record.form != Form::uniform) return Access::any;
  return record.param_dtype == DType::float64 ? Access::float64 : Access::float32;
}

/// Which kernel takes what both take.
Access both(Access a, Access b) {
  if (a == b) return a;
  const auto narrow = [](Access x) { return x == Access::float32 || x == Access::mixed; };
  return narrow(a) && narrow(b) ? Access::mixed : Access::any;
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
    put(out.rows, r * sizeof(RowRecord), rows[r]);
  }
}

void pack_scopes(const DeviceCall& call, Packed& out) {
  const Tensor* const tensors = call.step.tensors;
  std::int64_t t = 0;
  for (std::uint32_t k = 0; k < out.table.num_scopes; ++k) {
    ScopeRecord scope{};
    const double* const given = call.step.given_norms;
    scope.given = given ? given[call.step.joint ? 0 : k] : 0.0;
    scope.tensor = static_cast<std::uint32_t>(t);
    scope.row = call.scope_rows ? call.scope_rows[k] : 0;
    for (; t < call.step.num_tensors && tensors[t].scope == k; ++t) {
      const DType grad = tensors[t].grad_dtype;
      scope.wide = scope.wide || (tensors[t].layout ? is_wide(tensors[t]) : grad == DType::float64);
    }
    out.wide = out.wide || scope.wide;
    put(out.rows, out.table.scopes_begin() + k * sizeof(ScopeRecord), scope);
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
    put(out.slow, k * sizeof(std::uint32_t), out.chunks[k]);
  for (std::uint32_t t = 0; t < table.num_tensors; ++t) {
    const Tensor& tensor = call.step.tensors[t];
    // Of a sum alone there are no rows, and gradients are all that is read.
    const int slots = call.only_sum ? 0 : slots_of(Rules{}, call.step.rows[tensor.row].rule);
    const TensorRecord record = record_of(tensor, slots);
    const Access access = access_of(record);
    out.access = t == 0 ? access : both(out.access, access);
    put(out.grads, t * sizeof(void*), tensor.grad);
    put(out.slow, table.tensors_begin() + t * sizeof(TensorRecord), record);
    if (table.has_extras)
      put(out.slow, table.extras_begin() + t * sizeof(ExtraRecord), extra_of(tensor, out.slow));
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
  out.wide = false;
  out.access = Access::any;
  count_chunks(call, out.chunks);
  resize(out.rows, table.rows_size());
  resize(out.grads, table.grads_size());
  resize(out.slow, table.layouts_begin());
  pack_rows(call, out);
  pack_scopes(call, out);
  pack_tensors(call, out);
  if (out.rule < 0) out.access = Access::any;
}

}  // namespace fusedstep::cuda
