#include "bindings/call.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "bindings/gil.hpp"
#include "core/gradient.hpp"
#include "cpu/step.hpp"
#include "cpu/threads.hpp"

namespace fusedstep::bindings {

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
/// Shorter steps than this keep the GIL: giving it up costs more than it could win.
constexpr std::int64_t min_elements_without_gil = 16384;

thread_local std::unique_ptr<Call> spare;  // not a Handle: deleted when the thread ends

/// What a parameter or state of this type is stored as; refuses the rest.
DType output_dtype(const Buffer& buffer, const Place& place) {
  switch (buffer.scalar) {
    case Scalar::float32: return DType::float32;
    case Scalar::float64: return DType::float64;
    case Scalar::float16: return DType::float16;
    case Scalar::bfloat16: return DType::bfloat16;
    default: break;
  }
  fail(PyExc_TypeError, place,
       std::string(": dtype ") + name_of(buffer.scalar) +
           " cannot be updated; use float32, float64, float16 or bfloat16");
}

void check_shape(const Buffer& buffer, const Place& place, const Buffer& param,
                 const Place& param_place) {
  if (buffer.same_shape(param)) return;
  fail(PyExc_ValueError, place,
       ": expected shape " + param.shape_text() + " like " + param_place.spell() + ", got " +
           buffer.shape_text());
}

void check_order(const Buffer& buffer, const Place& place, const Buffer& param,
                 const Place& param_place) {
  if (buffer.same_order(param)) return;
  fail(PyExc_ValueError, place,
       ": expected the strides of " + param_place.spell() +
           " (same memory order); make it with zeros_like of the parameter");
}

[[noreturn]] void wrong_pair(const Place& place, DType got, const Place& param_place, DType param,
                             const char* fix) {
  fail(PyExc_TypeError, place,
       std::string(": dtype ") + name_of(got) + " does not go with " + param_place.spell() +
           " of dtype " + name_of(param) + "; use " + fix);
}

std::size_t num_chunks(std::int64_t numel) {
  return static_cast<std::size_t>((numel + chunk_size - 1) / chunk_size);
}

bool is_half(DType dtype) { return dtype == DType::float16 || dtype == DType::bfloat16; }

void check_state_dtype(DType state, const Place& place, DType param, const Place& param_place) {
  if (state == param) return;
  if (param == DType::float32 && is_half(state)) return;
  if (is_half(param) && state == DType::float32) return;
  const char* fix = param == DType::float64   ? "float64"
                    : param == DType::float32 ? "float32, float16 or bfloat16"
                                              : "float32 or the parameter's own";
  wrong_pair(place, state, param_place, param, fix);
}

/// Gradients of these types are read by the kernels as they are.
bool is_direct(Scalar grad, DType param) {
  switch (grad) {
    case Scalar::float64: return param == DType::float64;
    case Scalar::float32: return param != DType::float64;
    case Scalar::float16: return param == DType::float16 || param == DType::float32;
    case Scalar::bfloat16: return param == DType::bfloat16 || param == DType::float32;
    default: return false;
  }
}

/// States of a parameter that has changed its form do not fit any more, and are looked at again.
void keep_form(Recollection& known, const Buffer& param) {
  const auto dims = static_cast<std::size_t>(param.ndim);
  std::vector<std::int64_t>& form = known.form;
  const bool same = form.size() == 1 + 2 * dims && form[0] == static_cast<int>(param.scalar) &&
                    std::equal(param.shape, param.shape + dims, form.begin() + 1) &&
                    std::equal(param.strides, param.strides + dims, form.end() - param.ndim);
  if (same) return;
  form.assign(1, static_cast<int>(param.scalar));
  form.insert(form.end(), param.shape, param.shape + dims);
  form.insert(form.end(), param.strides, param.strides + dims);
  for (Recollection::State& state : known.states) state.slot = {};
}

std::string immutable_fix(PyObject* object) {
  const std::string type = type_name(Py_TYPE(object));
  const bool jax = type.rfind("jax", 0) == 0;
  return " is a " + type + ", which is immutable: it can be a gradient, but nothing can be " +
         "updated in it; " +
         (jax ? "pass NumPy arrays, or use fusedstep.jax" : "pass a mutable array");
}

}  // namespace

// ---- life -------------------------------------------------------------------------------------

Call::Handle Call::make() {
  // Importing may run Python code that steps something else: then there is no spare to take.
  return Handle(spare ? spare.release() : new Call());
}

void Call::Recycle::operator()(Call* call) const {
  call->clear();
  spare.reset(call);
}

void Call::clear() {
  owners_.clear();
  tensors_.clear();
  tensor_leaves_.clear();
  tensor_groups_.clear();
  rows_.clear();
  measures_ = false;
  spans_.clear();
  for (Written& written : written_) written.objects.clear();
  extents_.clear();
  layouts_.clear();
  created_.clear();
  elements_ = 0;
  block_states_ = false;
}

// ---- filling ----------------------------------------------------------------------------------

std::uint32_t Call::add_row(const RowSpec& spec, Progress progress) {
  rows_.push_back(spec.row);
  rows_.back().progress = progress;
  announce(spec);
  return static_cast<std::uint32_t>(rows_.size() - 1);
}

void Call::add_leaf(std::size_t index, const Leaf& leaf, const LeafNames& names, std::uint32_t row,
                    std::size_t group) {
  const auto id = static_cast<std::uint32_t>(index);
  const Place param_place{names.param, names.path};
  keep(leaf);  // first of all: what follows may run Python code that drops the others
  Tensor tensor{};
  Buffer param;
  Recollection* const known = leaf.known;
  tensor.param_dtype =
      import_output(leaf.param, param_place, param, known != nullptr ? &known->plain_at : nullptr);
  if (known != nullptr) keep_form(*known, param);
  tensor.param = param.data;
  tensor.numel = param.numel;
  tensor.row = row;
  add_span(param, id, Role::param, 0);
  import_gradient(leaf.grad, {names.grad, names.path}, param_place, param, tensor, id);
  if (leaf.chunk_sums != nullptr) {
    if (leaf.chunk_sums->size() != num_chunks(param.numel)) {
      fail(PyExc_ValueError, {names.grad, names.path}, " has another size than when it was read");
    }
    tensor.chunk_sums = leaf.chunk_sums->data();
  }
  const auto& slots = cpu::rule_infos()[static_cast<std::size_t>(rows_[row].rule)].slots;
  for (int k = 0; k < static_cast<int>(slots.size()); ++k) {
    const Place place{slots[static_cast<std::size_t>(k)], names.path};
    PyObject* state = leaf.states[k];
    py::object made;
    if (state == nullptr) {
      made = create_state(leaf.param, param, place);
      state = made.ptr();
      created_.push_back({index, rows_[row].rule, k, made});
    }
    const int at = leaf.known_state[k];
    const bool old = known != nullptr && !made;  // of one that a skipped step dropped nothing holds
    if (old && recall_state(*known, at, param, tensor, k, id)) continue;
    import_state(state, place, param_place, param, tensor, k, id,
                 known != nullptr ? &known->states[at] : nullptr);
  }
  if (leaf.copy != nullptr) {
    import_copy(leaf.copy, {names.copy, names.path}, param_place, param, tensor, id);
  }
  if (tensor.numel == 0) return;
  elements_ += tensor.numel;
  tensors_.push_back(tensor);
  tensor_leaves_.push_back(id);
  tensor_groups_.push_back(static_cast<std::uint32_t>(group));
}

std::size_t Call::make_sum(PyObject* param, bool waits, const Place& place, py::object& sum) {
  Buffer buffer, old;
  Owners owners;
  import_buffer(param, place, owners, buffer);
  if (sum) import_buffer(sum.ptr(), place, owners, old);
  if (waits) return num_chunks(old.numel);
  if (sum) {  // the parameter may have changed since the sum was made
    const bool wide = buffer.scalar == Scalar::float64;
    const bool fits = old.scalar == (wide ? Scalar::float64 : Scalar::float32) &&
                      old.same_shape(buffer) && old.same_order(buffer);
    if (!fits) sum = py::object();
  }
  if (!sum) sum = create_state(param, buffer, place);
  return num_chunks(buffer.numel);
}

std::vector<double> Call::measure(const Leaf& leaf, const LeafNames& names) {
  const Place param_place{names.param, names.path};
  keep(leaf);
  Tensor tensor{};
  Buffer param;
  tensor.param_dtype = import_output(leaf.param, param_place, param, &leaf.known->plain_at);
  import_gradient(leaf.grad, {names.grad, names.path}, param_place, param, tensor, 0);
  std::vector<double> sums(num_chunks(param.numel));
  tensor.numel = param.numel;
  tensor.chunk_sums = sums.data();
  tensors_.push_back(tensor);
  elements_ = tensor.numel;
  if (tensor.numel > 0) sum_squares();
  return sums;
}

void Call::add_output(std::size_t index, PyObject* object, const Place& place) {
  Buffer buffer;
  import_output(object, place, buffer);
  add_span(buffer, static_cast<std::uint32_t>(index), Role::param, 0);
}

void Call::add_state(PyObject* param, const Place& param_place, PyObject* state,
                     const Place& place) {
  Buffer buffer;
  Tensor tensor{};
  tensor.param_dtype = import_output(param, param_place, buffer);
  import_state(state, place, param_place, buffer, tensor, 0, 0);
}

void Call::keep(const Leaf& leaf) {
  for (PyObject* object : {leaf.param, leaf.grad, leaf.copy}) {
    if (object != nullptr) owners_.keep(object);
  }
  for (PyObject* state : leaf.states) {
    if (state != nullptr) owners_.keep(state);
  }
}

DType Call::import_output(PyObject* object, const Place& place, Buffer& out,
                          const void** plain_at) {
  owners_.keep(object);
  const Producer& producer = producer_of(object);
  if (producer.door == Producer::Door::number) {
    fail(PyExc_TypeError, place,
         ": a " + type_name(Py_TYPE(object)) +
             " cannot be updated in place; use np.array(..., np.float32)");
  }
  if (producer.immutable) fail(PyExc_TypeError, place, immutable_fix(object));
  import_buffer(object, place, owners_, out, plain_at != nullptr ? *plain_at : nullptr);
  if (plain_at != nullptr) *plain_at = out.data;
  const DType dtype = output_dtype(out, place);
  if (out.readonly) {
    fail(PyExc_BufferError, place, " is read-only; pass a writable array (.copy())");
  }
  if (!out.is_dense()) {
    fail(PyExc_ValueError, place,
         " is not dense (its elements do not fill one block of memory); keep it in an array of "
         "its own, as np.ascontiguousarray or .contiguous() make it");
  }
  note_write(object, *out.producer);
  return dtype;
}

void Call::import_gradient(PyObject* object, const Place& place, const Place& param_place,
                           const Buffer& param, Tensor& tensor, std::uint32_t leaf) {
  owners_.keep(object);
  Buffer grad;
  import_buffer(object, place, owners_, grad);
  if (grad.scalar == Scalar::int8) {
    fail(PyExc_TypeError, place, ": dtype int8 is no gradient; use a floating-point dtype");
  }
  check_shape(grad, place, param, param_place);
  tensor.grad = grad.data;
  tensor.grad_dtype = tensor.param_dtype;
  if (is_direct(grad.scalar, tensor.param_dtype) && grad.same_order(param)) {
    tensor.grad_dtype = output_dtype(grad, place);
  } else if (grad.numel > 0) {
    tensor.layout = layout_of(grad, param);
  }
  add_span(grad, leaf, Role::grad, 0);
}

void Call::import_state(PyObject* object, const Place& place, const Place& param_place,
                        const Buffer& param, Tensor& tensor, int slot, std::uint32_t leaf,
                        Recollection::State* known) {
  Slot& target = tensor.slots[slot];
  if (block_states_ && PyTuple_Check(object)) {
    return import_block_state(object, place, param, target, leaf, slot);
  }
  Buffer state;
  target.dtype = import_output(object, place, state, known != nullptr ? &known->plain_at : nullptr);
  check_shape(state, place, param, param_place);
  check_order(state, place, param, param_place);
  check_state_dtype(target.dtype, place, tensor.param_dtype, param_place);
  target.data = state.data;
  if (known != nullptr) known->slot = target;
  add_span(state, leaf, Role::state, slot);
}

bool Call::recall_state(const Recollection& known, int index, const Buffer& param, Tensor& tensor,
                        int slot, std::uint32_t leaf) {
  const Slot& where = known.states[index].slot;
  if (where.data == nullptr || known.shared) return false;
  tensor.slots[slot] = where;
  const auto begin = reinterpret_cast<std::uintptr_t>(where.data);
  const auto size = size_of(where.dtype) * static_cast<std::size_t>(param.numel);
  spans_.push_back({begin, begin + size, leaf, Role::state, static_cast<std::uint8_t>(slot)});
  return true;
}

void Call::import_block_state(PyObject* pair, const Place& place, const Buffer& param, Slot& slot,
                              std::uint32_t leaf, int index) {
  Buffer codes, scales;
  owners_.keep(pair);
  import_buffer(PyTuple_GetItem(pair, 0), place, owners_, codes);
  import_buffer(PyTuple_GetItem(pair, 1), place, owners_, scales);
  const std::int64_t blocks = (param.numel + block_size - 1) / block_size;
  const bool fits = codes.scalar == Scalar::int8 && codes.numel == param.numel &&
                    scales.scalar == Scalar::float32 && scales.numel == blocks &&
                    codes.is_dense() && scales.is_dense() && !codes.readonly && !scales.readonly;
  if (!fits) {
    fail(PyExc_ValueError, place, ": expected (int8 codes, float32 scales, one per 256 elements)");
  }
  slot = {codes.data, scales.data, DType::int8_blocks};
  add_span(codes, leaf, Role::state, index);
  add_span(scales, leaf, Role::state, index);
}

void Call::import_copy(PyObject* object, const Place& place, const Place& param_place,
                       const Buffer& param, Tensor& tensor, std::uint32_t leaf) {
  Buffer copy;
  tensor.copy_dtype = import_output(object, place, copy);
  check_shape(copy, place, param, param_place);
  check_order(copy, place, param, param_place);
  if (tensor.param_dtype != DType::float32 || !is_half(tensor.copy_dtype)) {
    wrong_pair(place, tensor.copy_dtype, param_place, tensor.param_dtype,
               "a float16 or bfloat16 copy of a float32 parameter");
  }
  tensor.copy = copy.data;
  add_span(copy, leaf, Role::copy, 0);
}

py::object Call::create_state(PyObject* param, const Buffer& buffer, const Place& place) {
  if (buffer.producer->zeros_like == nullptr) {
    fail(PyExc_TypeError, place,
         " cannot be made for a " + type_name(Py_TYPE(param)) + "; pass a buffer of zeros");
  }
  return py::handle(buffer.producer->zeros_like)(py::handle(param));
}

const GradLayout* Call::layout_of(const Buffer& grad, const Buffer& order) {
  int dims[max_ndim];  // the parameter's, outermost in memory first
  int count = 0;
  for (int d = 0; d < order.ndim; ++d) {
    if (order.shape[d] == 1) continue;
    int at = count++;
    for (; at > 0 && order.strides[dims[at - 1]] < order.strides[d]; --at) dims[at] = dims[at - 1];
    dims[at] = d;
  }
  std::vector<std::int64_t> shape, strides;
  for (int k = 0; k < count; ++k) {
    const std::int64_t extent = grad.shape[dims[k]], stride = grad.strides[dims[k]];
    if (!shape.empty() && strides.back() == stride * extent) {
      shape.back() *= extent;  // the two dimensions are one run
      strides.back() = stride;
    } else {
      shape.push_back(extent);
      strides.push_back(stride);
    }
  }
  const int ndim = static_cast<int>(shape.size());
  shape.insert(shape.end(), strides.begin(), strides.end());
  const std::int64_t* extents = extents_.emplace_back(std::move(shape)).data();
  const auto source = static_cast<GradLayout::Source>(grad.scalar);  // same order of enumerators
  return &layouts_.emplace_back(GradLayout{source, ndim, extents, extents + ndim});
}

void Call::add_span(const Buffer& buffer, std::uint32_t leaf, Role role, int slot) {
  if (buffer.numel == 0) return;
  auto begin = reinterpret_cast<std::uintptr_t>(buffer.data);
  std::uintptr_t end = begin + static_cast<std::uintptr_t>(size_of(buffer.scalar));
  for (int d = 0; d < buffer.ndim; ++d) {
    const std::int64_t reach = (buffer.shape[d] - 1) * buffer.strides[d];
    (reach < 0 ? begin : end) += static_cast<std::uintptr_t>(reach);
  }
  spans_.push_back({begin, end, leaf, role, static_cast<std::uint8_t>(slot)});
}

void Call::note_write(PyObject* object, const Producer& producer) {
  if (producer.after_write == nullptr) return;
  for (Written& written : written_) {
    if (written.producer == &producer) return written.objects.push_back(object);
  }
  written_.push_back({&producer, {object}});
}

void Call::add_gradient(PyObject* object, const Place& place) {
  owners_.keep(object);
  Buffer grad;
  import_buffer(object, place, owners_, grad);
  if (grad.scalar == Scalar::int8) {
    fail(PyExc_TypeError, place, ": dtype int8 is no gradient; use a floating-point dtype");
  }
  if (grad.numel == 0) return;
  Tensor tensor{};
  const bool wide = grad.scalar == Scalar::float64 || grad.scalar == Scalar::longdouble;
  tensor.param_dtype = wide ? DType::float64 : DType::float32;
  tensor.grad_dtype = tensor.param_dtype;
  tensor.grad = grad.data;
  tensor.numel = grad.numel;
  if (is_direct(grad.scalar, tensor.param_dtype) && grad.is_dense()) {
    tensor.grad_dtype = output_dtype(grad, place);
  } else {
    Buffer row_major = grad;
    std::int64_t stride = 1;
    for (int d = grad.ndim - 1; d >= 0; stride *= grad.shape[d--]) row_major.strides[d] = stride;
    tensor.layout = layout_of(grad, row_major);
  }
  tensors_.push_back(tensor);
  elements_ += tensor.numel;
}

// ---- running ----------------------------------------------------------------------------------

void Call::check_overlap(const Speller& spell) {
  const auto overlap = find_overlap(spans_);
  if (!overlap) return;
  const auto& [a, b] = *overlap;
  const std::string text = spell(a.leaf, a.role, a.slot) + " and " + spell(b.leaf, b.role, b.slot) +
                           " overlap in memory; each output needs memory of its own";
  PyErr_SetString(PyExc_BufferError, text.c_str());
  throw py::error_already_set();
}

/// With one norm for all, tensors of equal rescale_grad share one tree, whatever groups there are:
/// then the bits of the norm do not depend on the grouping.
void Call::set_scopes(ClipScope scope) {
  if (scope == ClipScope::array) give_each_tensor_a_row();
  scope_scales_.clear();
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    const double scale = std::fabs(rows_[tensors_[t].row].rescale_grad);
    const bool begins = t == 0 || scope == ClipScope::array ||
                        (scope == ClipScope::group ? tensor_groups_[t] != tensor_groups_[t - 1]
                                                   : scope_scales_.back() != scale);
    if (begins) scope_scales_.push_back(scale);
    tensors_[t].scope = static_cast<std::uint32_t>(scope_scales_.size() - 1);
  }
  if (scope_scales_.empty()) scope_scales_.push_back(1.0);
}

/// The tensors of a row are clipped alike.
void Call::give_each_tensor_a_row() {
  std::vector<bool> taken(rows_.size(), false);
  for (Tensor& tensor : tensors_) {
    if (taken[tensor.row]) {
      rows_.push_back(Row(rows_[tensor.row]));
      tensor.row = static_cast<std::uint32_t>(rows_.size() - 1);
    } else {
      taken[tensor.row] = true;
    }
  }
}

std::optional<double> Call::given_norm(py::handle grad_norm) const {
  if (grad_norm.is_none()) return std::nullopt;
  const double norm = to_double(grad_norm.ptr());
  if (norm < 0) {
    throw py::value_error("grad_norm: expected a norm >= 0, got " + brief(grad_norm.ptr()));
  }
  if (scope_scales_.size() > 1) {
    throw py::value_error(
        "grad_norm: one norm does not say enough when groups differ in rescale_grad (rescale the "
        "gradients instead) or are clipped by norms of their own (grad_clip_scope)");
  }
  return norm;
}

template <class Kernels>
void Call::run_kernels(Kernels kernels) const {
  elements_ < min_elements_without_gil ? kernels() : without_gil(kernels);
}

StepReport Call::run(const Policy& policy, py::handle grad_norm, std::size_t leaves,
                     const Speller& spell, StepCall::Sums sums) {
  check_overlap(spell);
  set_scopes(policy.clip_scope);
  const std::optional<double> given = given_norm(grad_norm);
  const bool judges = policy.on_nonfinite != OnNonfinite::propagate;
  const bool measure = judges || ((measures_ || policy.skip_norm != infinity) && !given);
  norms_.assign(scope_scales_.size(), 0.0);
  tensor_norms_.assign(tensors_.size(), 0.0);
  clip_coefs_.assign(rows_.size(), 1.0);

  StepCall call{};
  call.tensors = tensors_.data();
  call.num_tensors = static_cast<std::int64_t>(tensors_.size());
  call.rows = rows_.data();
  call.num_rows = static_cast<int>(rows_.size());
  call.num_scopes = static_cast<int>(scope_scales_.size());
  call.scope_scale = scope_scales_.data();
  call.joint = policy.clip_scope == ClipScope::all;
  call.measure_norm = measure;
  call.skip_nonfinite = judges;
  call.skip_norm = policy.skip_norm;
  call.sums = sums;
  call.given_norms = given ? &*given : nullptr;
  call.num_threads = cpu::get_num_threads();
  StepOutcome outcome{};
  outcome.norms = norms_.data();
  outcome.tensor_norms = tensor_norms_.data();
  outcome.clip_coefs = clip_coefs_.data();
  StepReport report;
  if (measure && !given)
    report.tensor_norms = py::array_t<double>(static_cast<py::ssize_t>(leaves));
  run_kernels([&] { cpu::step(call, outcome); });
  if (policy.on_nonfinite == OnNonfinite::raise && outcome.nonfinite) {
    raise_nonfinite(outcome, spell);
  }
  if (measure || given) report.grad_norm = outcome.norm;
  report.skipped = outcome.skipped;
  fill(report);
  return report;
}

void Call::raise_nonfinite(const StepOutcome& outcome, const Speller& spell) const {
  const auto first = outcome.first_nonfinite;
  const std::string what =
      first < 0 ? "grad_norm is not finite"
                : spell(tensor_leaves_[static_cast<std::size_t>(first)], Role::grad, 0) +
                      " holds inf or NaN";
  PyErr_SetString(PyExc_FloatingPointError, (what + "; nothing was changed").c_str());
  throw py::error_already_set();
}

void Call::fill(StepReport& report) const {
  for (const Tensor& tensor : tensors_) {
    report.clip_coef = smaller_coefficient(report.clip_coef, clip_coefs_[tensor.row]);
  }
  if (report.tensor_norms.is_none()) return;
  auto norms = py::reinterpret_borrow<py::array_t<double>>(report.tensor_norms);
  std::fill_n(norms.mutable_data(), norms.size(), 0.0);
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    norms.mutable_data()[tensor_leaves_[t]] = tensor_norms_[t];
  }
}

void Call::tell_producers() {
  for (const Written& written : written_) {
    if (written.objects.empty()) continue;
    py::list objects(written.objects.size());
    for (std::size_t k = 0; k < written.objects.size(); ++k) {
      objects[k] = py::handle(written.objects[k]);
    }
    py::handle(written.producer->after_write)(objects);
  }
}

double Call::sum_squares() {
  const int threads = cpu::get_num_threads();
  const auto count = static_cast<std::int64_t>(tensors_.size());
  double sum = 0.0;
  run_kernels([&] { sum = cpu::sum_squares(tensors_.data(), count, threads); });
  return sum;
}

}  // namespace fusedstep::bindings
