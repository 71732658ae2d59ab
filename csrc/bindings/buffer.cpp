#include "bindings/buffer.hpp"

#include <pybind11/numpy.h>

#include "bindings/stream.hpp"

namespace fusedstep::bindings {

namespace {

constexpr int numpy_writeable = 0x0400;  // NPY_ARRAY_WRITEABLE
constexpr const char* supported = " is not supported; use float32, float64, float16 or bfloat16";

// ---- element types ----------------------------------------------------------------------------

[[noreturn]] void unsupported_dtype(const Place& place, const std::string& dtype) {
  fail(PyExc_TypeError, place, ": dtype " + dtype + supported);
}

/// NumPy's own numbers of its types; bfloat16 is a user type whose number is given at run time.
Scalar numpy_scalar(PyObject* descr, const Place& place, bool integers) {
  const auto* proxy = py::detail::array_descriptor_proxy(descr);
  const bool swapped = proxy->byteorder == (PY_BIG_ENDIAN ? '<' : '>');
  static int bfloat16_number = -1;
  if (!swapped) {
    switch (proxy->type_num) {
      case 11: return Scalar::float32;
      case 12: return Scalar::float64;
      case 13: return Scalar::longdouble;
      case 23: return Scalar::float16;
      case 1: return Scalar::int8;
      default: break;
    }
    if (proxy->type_num == bfloat16_number) return Scalar::bfloat16;
    if (integers) {
      switch (proxy->type_num) {
        case 0: return Scalar::boolean;
        case 5: return Scalar::int32;
        case 7:  // long; where it has 32 bits we do not build
        case 9: return Scalar::int64;
        default: break;
      }
    }
  }
  const auto name = static_cast<std::string>(py::str(py::handle(descr)));
  if (name != "bfloat16" || swapped) unsupported_dtype(place, name);
  bfloat16_number = proxy->type_num;
  return Scalar::bfloat16;
}

std::string dlpack_name(DLDataType dtype) {
  static const char* const codes[] = {"int",    "uint",    "float", "opaque",
                                      "bfloat", "complex", "bool"};
  const std::string code =
      dtype.code < 7 ? codes[dtype.code] : "DLPack code " + std::to_string(dtype.code) + ", bits ";
  return code + std::to_string(dtype.bits) + (dtype.lanes > 1 ? " in vectors" : "");
}

Scalar dlpack_scalar(DLDataType dtype, const Place& place, bool integers) {
  if (dtype.lanes == 1) {
    if (dtype.code == kDLFloat && dtype.bits == 32) return Scalar::float32;
    if (dtype.code == kDLFloat && dtype.bits == 64) return Scalar::float64;
    if (dtype.code == kDLFloat && dtype.bits == 16) return Scalar::float16;
    if (dtype.code == kDLBfloat && dtype.bits == 16) return Scalar::bfloat16;
    if (dtype.code == kDLInt && dtype.bits == 8) return Scalar::int8;
    if (integers && dtype.code == kDLInt && dtype.bits == 32) return Scalar::int32;
    if (integers && dtype.code == kDLInt && dtype.bits == 64) return Scalar::int64;
    if (integers && dtype.code == kDLBool && dtype.bits == 8) return Scalar::boolean;
  }
  unsupported_dtype(place, dlpack_name(dtype));
}

Scalar protocol_scalar(const char* format, const Place& place) {
  const std::string text = format != nullptr ? format : "B";
  const bool prefixed = text.size() == 2 && (text[0] == '@' || text[0] == '=' || text[0] == '<');
  if (text.size() == 1 || prefixed) {
    switch (text.back()) {
      case 'f': return Scalar::float32;
      case 'd': return Scalar::float64;
      case 'e': return Scalar::float16;
      case 'b': return Scalar::int8;
      case 'g':
        if (text.size() == 1 || text[0] == '@') return Scalar::longdouble;
        break;
      default: break;
    }
  }
  unsupported_dtype(place, "'" + text + "' (buffer protocol)");
}

// ---- doors ------------------------------------------------------------------------------------

void set_ndim(int ndim, const Place& place, Buffer& out) {
  if (ndim < 0 || ndim > max_ndim) {
    fail(PyExc_ValueError, place, " has " + std::to_string(ndim) + " dimensions; at most 64 work");
  }
  out.ndim = ndim;
}

template <class Extent>
void set_layout(const Extent* shape, const Extent* strides, std::int64_t unit, Buffer& out) {
  out.numel = 1;
  for (int d = out.ndim - 1; d >= 0; --d) {
    out.shape[d] = shape[d];
    out.strides[d] = strides != nullptr ? strides[d] * unit : out.numel * unit;
    out.numel *= shape[d];
  }
}

void import_numpy(PyObject* object, const Place& place, bool integers, Buffer& out) {
  const auto* array = py::detail::array_proxy(object);
  if (out.producer->masked) {
    fail(PyExc_TypeError, place, " is a masked array, whose mask would be ignored; pass its .data");
  }
  out.scalar = numpy_scalar(array->descr, place, integers);
  out.data = array->data;
  out.readonly = (array->flags & numpy_writeable) == 0;
  set_ndim(array->nd, place, out);
  set_layout(array->dimensions, array->strides, 1, out);
}

Device device_of(const DLDevice& device, const Place& place) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
    case kDLROCMHost: return {};
    case kDLCUDA:
    case kDLCUDAManaged: return {Device::Type::cuda, device.device_id};
    default: break;
  }
  fail(PyExc_RuntimeError, place,
       " is not in CPU memory (DLPack device type " + std::to_string(device.device_type) +
           "); this build of fusedstep has no backend for it");
}

/// The kernels of a device read whole elements.
void check_alignment(const Buffer& buffer, const Place& place) {
  const std::int64_t size = size_of(buffer.scalar);
  if (reinterpret_cast<std::uintptr_t>(buffer.data) % static_cast<std::uintptr_t>(size) == 0)
    return;
  fail(PyExc_BufferError, place,
       ": an array on a device has to be aligned to its elements of " + std::to_string(size) +
           " bytes; copy it");
}

void import_dltensor(const DLTensor& tensor, const Place& place, bool integers, Buffer& out) {
  out.device = device_of(tensor.device, place);
  out.scalar = dlpack_scalar(tensor.dtype, place, integers);
  out.data = static_cast<char*>(tensor.data) + (tensor.data != nullptr ? tensor.byte_offset : 0);
  if (!out.device.is_cpu()) check_alignment(out, place);
  set_ndim(tensor.ndim, place, out);
  set_layout(tensor.shape, tensor.strides, size_of(out.scalar), out);
}

/// Turns the pending Python error of an exporter into one that names the place.
[[noreturn]] void export_failed(py::error_already_set& error, const Place& place,
                                PyObject* object) {
  if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw error;
  auto text = static_cast<std::string>(py::str(error.value()));
  text = text.substr(0, text.find('\n'));
  const std::string message = place.spell() + ": a " + type_name(Py_TYPE(object)) +
                              " that does not hand out its memory: " + text;
  PyObject* kind = error.matches(PyExc_BufferError) ? PyExc_BufferError : PyExc_TypeError;
  py::raise_from(error, kind, message.c_str());
  throw py::error_already_set();
}

/// Runs code of the exporter; what it raises gets the place in front.
template <class Call>
py::object exporting(PyObject* object, const Place& place, Call&& call) {
  try {
    py::object result = py::reinterpret_steal<py::object>(call());
    if (!result) throw py::error_already_set();
    return result;
  } catch (py::error_already_set& error) {
    export_failed(error, place, object);
  }
}

void delete_managed(PyObject* capsule) {
  auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "managed"));
  if (managed->deleter != nullptr) managed->deleter(managed);
}

void import_exchange(PyObject* object, const Place& place, Owners& owners, bool integers,
                     Buffer& out) {
  const DLPackExchangeAPI& api = *out.producer->exchange;
  if (api.dltensor_from_py_object_no_sync != nullptr) {
    DLTensor tensor;
    if (api.dltensor_from_py_object_no_sync(object, &tensor) != 0) {
      py::error_already_set error;
      export_failed(error, place, object);
    }
    return import_dltensor(tensor, place, integers, out);
  }
  DLManagedTensorVersioned* managed = nullptr;
  owners.keep(exporting(object, place, [&]() -> PyObject* {
    if (api.managed_tensor_from_py_object_no_sync(object, &managed) != 0) return nullptr;
    return PyCapsule_New(managed, "managed", delete_managed);
  }));
  out.readonly = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
  import_dltensor(managed->dl_tensor, place, integers, out);
}

/// We never consume a capsule (rename it): as long as it is kept it keeps the memory, and its own
/// destructor gives the memory back.
void import_capsule(py::object capsule, const Place& place, Owners& owners, bool integers,
                    Buffer& out) {
  PyObject* raw = capsule.ptr();
  owners.keep(std::move(capsule));
  if (PyCapsule_IsValid(raw, "dltensor_versioned")) {
    const auto* managed = static_cast<const DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(raw, "dltensor_versioned"));
    if (managed->version.major != DLPACK_MAJOR_VERSION) {
      fail(PyExc_BufferError, place,
           ": DLPack version " + std::to_string(managed->version.major) + " is not supported");
    }
    constexpr std::uint64_t not_ours =
        DLPACK_FLAG_BITMASK_READ_ONLY | DLPACK_FLAG_BITMASK_IS_COPIED;
    out.readonly = (managed->flags & not_ours) != 0;
    return import_dltensor(managed->dl_tensor, place, integers, out);
  }
  if (!PyCapsule_IsValid(raw, "dltensor")) {
    fail(PyExc_BufferError, place, ": __dlpack__ gave no DLPack capsule, or a consumed one");
  }
  const auto* managed = static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(raw, "dltensor"));
  import_dltensor(managed->dl_tensor, place, integers, out);
}

/// The device of an array that is only known by `__dlpack__`. Other devices than CUDA's are found
/// out when the array is imported.
Device announced_device(PyObject* object) {
  const py::object method = py::getattr(object, "__dlpack_device__", py::none());
  if (method.is_none()) return {};
  const py::object pair = method();
  const bool fits = PyTuple_Check(pair.ptr()) && PyTuple_GET_SIZE(pair.ptr()) == 2;
  if (!fits) throw py::type_error("__dlpack_device__ gave no pair");
  const int type = py::cast<int>(py::int_(py::object(pair[py::int_(0)])));
  if (type != kDLCUDA && type != kDLCUDAManaged) return {};
  return {Device::Type::cuda, py::cast<int>(py::int_(py::object(pair[py::int_(1)])))};
}

/// A stream is only named to devices: NumPy's kind wants none.
py::dict dlpack_options(PyObject* object, const Producer& producer, const Device& device,
                        StreamChoice* choice) {
  py::dict options;
  if (device.is_cpu()) return options;
  options["stream"] =
      choice != nullptr ? choice->requested_of(object, producer, device.id) : std::intptr_t{-1};
  return options;
}

PyObject* call_dlpack(PyObject* object, const py::dict& old_options) {
  const py::object method = py::handle(object).attr("__dlpack__");
  const py::dict options(old_options.attr("copy")());
  options["max_version"] = py::make_tuple(1, 3);
  try {
    return method(**options).release().ptr();
  } catch (py::error_already_set& error) {
    const auto text = static_cast<std::string>(py::str(error.value()));
    const bool old = text.find("max_version") != std::string::npos ||
                     text.find("keyword argument") != std::string::npos;
    if (!error.matches(PyExc_TypeError) || !old) throw;
  }
  return method(**old_options).release().ptr();  // a producer from before DLPack 1.0
}

void import_protocol(PyObject* object, const Place& place, Owners& owners, Buffer& out) {
  py::object view = exporting(object, place, [&] { return PyMemoryView_FromObject(object); });
  const Py_buffer* memory = PyMemoryView_GET_BUFFER(view.ptr());
  owners.keep(std::move(view));
  for (int d = 0; memory->suboffsets != nullptr && d < memory->ndim; ++d) {
    if (memory->suboffsets[d] >= 0) {
      fail(PyExc_BufferError, place, " is an array of pointers to its rows; copy it to an array");
    }
  }
  out.scalar = protocol_scalar(memory->format, place);
  out.data = memory->buf;
  out.readonly = memory->readonly != 0;
  set_ndim(memory->ndim, place, out);
  set_layout(memory->shape, memory->strides, 1, out);
}

void import_number(PyObject* object, const Place& place, Owners& owners, Buffer& out) {
  py::object array = py::module_::import("numpy").attr("asarray")(py::handle(object));
  if (PyLong_Check(object)) array = array.attr("astype")("float64");
  import_numpy(array.ptr(), place, false, out);
  out.readonly = true;
  owners.keep(std::move(array));
}

void import_dlpack(PyObject* object, const Place& place, Owners& owners,
                   const ImportOptions& options, Buffer& out) {
  Device device;
  exporting(object, place, [&] {
    device = announced_device(object);
    return Py_NewRef(Py_None);
  });
  const py::dict asked = dlpack_options(object, *out.producer, device, options.stream);
  auto call = [&] { return call_dlpack(object, asked); };
  import_capsule(exporting(object, place, call), place, owners, options.integers, out);
}

/// What was imported without any order, of a library that works on another stream than the call:
/// `__dlpack__` lets that stream wait. Torch's refuses what requires a gradient.
void put_in_order(PyObject* object, const Place& place, Owners& owners,
                  const ImportOptions& options, Buffer& out) {
  if (out.device.is_cpu() || options.stream == nullptr) return;
  if (options.stream->requested_of(object, *out.producer, out.device.id) == -1) return;
  py::object plain = py::reinterpret_borrow<py::object>(object);
  if (py::hasattr(plain, "detach")) plain = plain.attr("detach")();
  import_dlpack(plain.ptr(), place, owners, options, out);
}

void enter(PyObject* object, const Place& place, Owners& owners, const ImportOptions& options,
           Buffer& out) {
  using Door = Producer::Door;
  const bool integers = options.integers;
  switch (out.producer->door) {
    case Door::numpy: return import_numpy(object, place, integers, out);
    case Door::exchange: {
      import_exchange(object, place, owners, integers, out);
      return put_in_order(object, place, owners, options, out);
    }
    case Door::function: {
      auto call = [&] { return PyObject_CallOneArg(out.producer->function, object); };
      import_capsule(exporting(object, place, call), place, owners, integers, out);
      return put_in_order(object, place, owners, options, out);
    }
    case Door::dlpack: return import_dlpack(object, place, owners, options, out);
    case Door::protocol: return import_protocol(object, place, owners, out);
    case Door::number: return import_number(object, place, owners, out);
    case Door::none: break;
  }
  fail(PyExc_TypeError, place, ": expected an array, got " + brief(object));
}

/// Exporters do not report that a torch tensor's values are to be read with the other sign.
void refuse_negated(PyObject* object, const Place& place, const Buffer& buffer) {
  const py::object negated =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(buffer.producer->is_negated, object));
  if (!negated) throw py::error_already_set();
  if (negated.ptr() == Py_True) {
    fail(PyExc_BufferError, place,
         " is a lazily negated torch tensor; pass its .resolve_neg() instead");
  }
}

}  // namespace

const char* name_of(Scalar scalar) {
  static const char* const names[] = {"float16", "bfloat16", "float32", "float64", "longdouble",
                                      "int8",    "int32",    "int64",   "bool"};
  return names[static_cast<int>(scalar)];
}

std::int64_t size_of(Scalar scalar) {
  static constexpr std::int64_t sizes[] = {2, 2, 4, 8, sizeof(long double), 1, 4, 8, 1};
  return sizes[static_cast<int>(scalar)];
}

std::string Device::spell() const { return is_cpu() ? "cpu" : "cuda:" + std::to_string(id); }

void import_buffer(PyObject* object, const Place& place, Owners& owners, Buffer& out,
                   const ImportOptions& options) {
  out.producer = &producer_of(object);
  out.device = {};
  out.readonly = false;
  enter(object, place, owners, options, out);
  if (!out.device.is_cpu() && options.stream != nullptr) {
    options.stream->meet(object, *out.producer, out.device.id);
  }
  if (out.numel > 0 && out.data == nullptr) {
    fail(PyExc_BufferError, place,
         ": a " + type_name(Py_TYPE(object)) +
             " without memory of its own (a wrapper, fake or distributed tensor?); pass the "
             "tensor that it holds");
  }
  if (out.producer->is_negated != nullptr && out.data != options.plain_at) {
    refuse_negated(object, place, out);
  }
  if (out.producer->immutable) out.readonly = true;
}

bool Buffer::is_row_major() const {
  std::int64_t expected = size_of(scalar);
  for (int d = ndim - 1; d >= 0; --d) {
    if (shape[d] != 1 && strides[d] != expected) return false;
    expected *= shape[d];
  }
  return true;
}

bool Buffer::is_dense() const {
  if (numel == 0 || is_row_major()) return true;
  std::int64_t sizes[max_ndim], steps[max_ndim];
  int count = 0;
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] == 1) continue;
    int at = count++;  // insertion by stride, largest first
    for (; at > 0 && steps[at - 1] < strides[d]; --at) {
      sizes[at] = sizes[at - 1];
      steps[at] = steps[at - 1];
    }
    sizes[at] = shape[d];
    steps[at] = strides[d];
  }
  std::int64_t expected = size_of(scalar);
  for (int k = count - 1; k >= 0; --k) {
    if (steps[k] != expected) return false;
    expected *= sizes[k];
  }
  return true;
}

bool Buffer::same_shape(const Buffer& other) const {
  if (ndim != other.ndim) return false;
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] != other.shape[d]) return false;
  }
  return true;
}

bool Buffer::same_order(const Buffer& other) const {
  if (numel == 0) return true;
  const std::int64_t mine = size_of(scalar), theirs = size_of(other.scalar);
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] > 1 && strides[d] * theirs != other.strides[d] * mine) return false;
  }
  return true;
}

std::string Buffer::shape_text() const {
  std::string text = "(";
  for (int d = 0; d < ndim; ++d) text += (d > 0 ? ", " : "") + std::to_string(shape[d]);
  return text + (ndim == 1 ? ",)" : ")");
}

}  // namespace fusedstep::bindings
