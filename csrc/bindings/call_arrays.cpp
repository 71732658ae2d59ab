// How the arrays of a call get in: imports, checks, and what is made where something is missing.
#include <algorithm>
#include <cmath>
#include <utility>

#include "bindings/call.hpp"

namespace fusedstep::bindings {

namespace {

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

void check_device(const Buffer& buffer, const Place& place, const Buffer& param,
                  const Place& param_place) {
  if (buffer.device == param.device) return;
  fail(PyExc_ValueError, place,
       " is on " + buffer.device.spell() + ", but " + param_place.spell() + " is on " +
           param.device.spell() + "; the arrays of a call have to be on one device");
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
  const std::int64_t place = param.device.is_cpu() ? 0 : 1 + param.device.id;
  const std::int64_t kind = static_cast<std::int64_t>(param.scalar) + (place << 8);
  const bool same = form.size() == 1 + 2 * dims && form[0] == kind &&
                    std::equal(param.shape, param.shape + dims, form.begin() + 1) &&
                    std::equal(param.strides, param.strides + dims, form.end() - param.ndim);
  if (same) return;
  form.assign(1, kind);
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

void ChunkSums::resize(std::size_t size, Arena* arena) {
  if (arena == nullptr) {
    host_.resize(size);
    data_ = host_.data();
    room_ = 0;
  } else if (arena != arena_ || size > room_) {
    const auto bytes = static_cast<std::int64_t>(size * sizeof(double));
    data_ = static_cast<double*>(arena->allocate(bytes, alignof(double)));
    host_ = {};
    room_ = size;
  }
  arena_ = arena;
  size_ = size;
}

void ChunkSums::clear() {
  host_ = {};
  size_ = 0;
  if (arena_ == nullptr) data_ = nullptr;
}

std::uint32_t Call::add_row(const RowSpec& spec, Progress progress) {
  rows_.push_back(spec.row);
  rows_.back().progress = progress;
  announce(spec);
  const auto index = static_cast<std::uint32_t>(rows_.size() - 1);
  if (spec.lr != nullptr || spec.rescale != nullptr) {
    row_arrays_.push_back({index, spec.lr, spec.rescale});
  }
  return index;
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
  meet_device(param, param_place, id);
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
  import_array(param, place, buffer);
  meet_device(buffer, place, 0);
  if (sum) import_array(sum.ptr(), place, old);
  if (waits) return num_chunks(old.numel);
  if (sum) {  // the parameter may have changed since the sum was made
    const bool wide = buffer.scalar == Scalar::float64;
    const bool fits = old.scalar == (wide ? Scalar::float64 : Scalar::float32) &&
                      old.device == buffer.device && old.same_shape(buffer) &&
                      old.same_order(buffer);
    if (!fits) sum = py::object();
  }
  if (!sum) sum = create_state(param, buffer, place);
  return num_chunks(buffer.numel);
}

std::size_t Call::add_measured(const Leaf& leaf, const LeafNames& names) {
  const Place param_place{names.param, names.path};
  keep(leaf);
  Tensor tensor{};
  Buffer param;
  tensor.param_dtype = import_output(leaf.param, param_place, param, &leaf.known->plain_at);
  meet_device(param, param_place, 0);
  import_gradient(leaf.grad, {names.grad, names.path}, param_place, param, tensor, 0);
  tensor.numel = param.numel;
  tensors_.push_back(tensor);
  elements_ = tensor.numel;
  return num_chunks(param.numel);
}

void Call::set_chunk_sums(double* sums) { tensors_.back().chunk_sums = sums; }

void Call::add_output(std::size_t index, PyObject* object, const Place& place) {
  Buffer buffer;
  const auto id = static_cast<std::uint32_t>(index);
  import_output(object, place, buffer);
  meet_device(buffer, place, id);
  add_span(buffer, id, Role::param, 0);
}

void Call::add_state(PyObject* param, const Place& param_place, PyObject* state,
                     const Place& place) {
  Buffer buffer;
  Tensor tensor{};
  tensor.param_dtype = import_output(param, param_place, buffer);
  meet_device(buffer, param_place, 0);
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

void Call::import_array(PyObject* object, const Place& place, Buffer& out, const void* plain_at) {
  import_buffer(object, place, owners_, out, {plain_at, false, &stream_});
}

/// The first parameter decides where the call is. That another one is elsewhere is told when all
/// are known, and both can be named.
void Call::meet_device(const Buffer& param, const Place& place, std::uint32_t leaf) {
  if (!has_device_) {
    device_ = param.device;
    first_leaf_ = leaf;
    has_device_ = true;
    if (!device_.is_cpu()) gpu_ = find_gpu(device_, place);
  } else if (param.device != device_ && !odd_device_) {
    odd_leaf_ = leaf;
    odd_device_ = param.device;
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
  import_array(object, place, out, plain_at != nullptr ? *plain_at : nullptr);
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
  import_array(object, place, grad);
  if (grad.scalar == Scalar::int8) {
    fail(PyExc_TypeError, place, ": dtype int8 is no gradient; use a floating-point dtype");
  }
  check_device(grad, place, param, param_place);
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
  check_device(state, place, param, param_place);
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
  import_array(PyTuple_GetItem(pair, 0), place, codes);
  import_array(PyTuple_GetItem(pair, 1), place, scales);
  const std::int64_t blocks = (param.numel + block_size - 1) / block_size;
  const bool fits = codes.scalar == Scalar::int8 && codes.numel == param.numel &&
                    scales.scalar == Scalar::float32 && scales.numel == blocks &&
                    codes.device == param.device && scales.device == param.device &&
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
  check_device(copy, place, param, param_place);
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
  const bool on_device = !buffer.device.is_cpu();
  if (on_device) {
    refuse_capture(gpu_, stream(), place.spell() + " cannot be made (take a step before)");
  }
  py::object made = py::handle(buffer.producer->zeros_like)(py::handle(param));
  if (on_device) wait_for_zeros(made, place);
  return made;
}

/// Its library has zeroed it in the order of its own stream, which need not be that of the call.
void Call::wait_for_zeros(const py::object& made, const Place& place) {
  Buffer buffer;
  import_array(made.ptr(), place, buffer);
  bool known = false;
  const Stream own = current_stream(made.ptr(), *buffer.producer, gpu_.id, &known);
  if (buffer.numel == 0 || own.handle == stream().handle) return;
  char byte;
  gpu_.copy_out(own, place.name, &byte, buffer.data, 1);
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

void Call::add_gradient(std::size_t index, PyObject* object, const Place& place) {
  owners_.keep(object);
  Buffer grad;
  import_array(object, place, grad);
  meet_device(grad, place, static_cast<std::uint32_t>(index));
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

}  // namespace fusedstep::bindings
