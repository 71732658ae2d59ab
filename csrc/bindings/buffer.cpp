#include "bindings/buffer.hpp"

#include <pybind11/numpy.h>

#include <memory>
#include <unordered_map>

namespace fusedstep::bindings {

namespace {

constexpr int numpy_writeable = 0x0400;  // NPY_ARRAY_WRITEABLE
constexpr const char* supported = " is not supported; use float32, float64, float16 or bfloat16";

// ---- type cache -------------------------------------------------------------------------------

py::object& producer_lookup() {
  static auto* lookup = new py::object();  // leaked: outlives the interpreter's teardown order
  return *lookup;
}

/// The exchange table of our major version, or null. Tables live for ever.
const DLPackExchangeAPI* exchange_table(PyTypeObject* type) {
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
    return nullptr;
  }
  const py::object owner = py::reinterpret_steal<py::object>(capsule);
  if (!PyCapsule_IsValid(capsule, "dlpack_exchange_api")) return nullptr;
  auto* header =
      static_cast<DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != DLPACK_MAJOR_VERSION) {
    header = header->prev_api;
  }
  return reinterpret_cast<const DLPackExchangeAPI*>(header);
}

bool is_number(PyTypeObject* type) {
  if (PyType_IsSubtype(type, &PyFloat_Type) || PyType_IsSubtype(type, &PyLong_Type)) return true;
  static PyObject* const generic =
      py::module_::import("numpy").attr("generic").cast<py::object>().release().ptr();
  return PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(generic)) != 0;
}

/// torch before 2.10 has no exchange table, and its `__dlpack__` refuses parameters.
PyObject* torch_capsule_function() {
  const py::dict modules = py::module_::import("sys").attr("modules");
  if (!modules.contains("torch")) return nullptr;
  return py::getattr(modules["torch"].attr("_C"), "_to_dlpack", py::none()).release().ptr();
}

Producer::Door door_of(Producer& producer, PyTypeObject* type, bool torch) {
  using Door = Producer::Door;
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  auto* numpy_array = py::detail::npy_api::get().PyArray_Type_;
  if (PyType_IsSubtype(type, numpy_array)) return Door::numpy;
  if (is_number(type)) return Door::number;
  producer.exchange = exchange_table(type);
  if (producer.exchange != nullptr) return Door::exchange;
  if (torch) producer.function = torch_capsule_function();
  if (producer.function != nullptr && producer.function != Py_None) return Door::function;
  if (py::hasattr(handle, "__dlpack__")) return Door::dlpack;
  const bool text = PyType_IsSubtype(type, &PyBytes_Type) != 0;
  const auto* protocol = type->tp_as_buffer;
  if (!text && protocol != nullptr && protocol->bf_getbuffer != nullptr) return Door::protocol;
  return Door::none;
}

PyObject* optional(const py::object& entry, const char* attribute) {
  PyObject* value = entry.attr(attribute).cast<py::object>().release().ptr();
  return value == Py_None ? nullptr : value;
}

std::unique_ptr<Producer> make_producer(PyTypeObject* type) {
  auto producer = std::make_unique<Producer>();
  Py_INCREF(type);
  producer->type = type;
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  // A subclass of a user's own counts as torch's: it inherits the tensor and its duties.
  const bool torch = py::hasattr(handle, "is_neg") && py::hasattr(handle, "_version");
  producer->door = door_of(*producer, type, torch);
  if (producer->door == Producer::Door::none) return producer;
  for (const auto base : handle.attr("__mro__")) {
    const auto home = static_cast<std::string>(py::str(base.attr("__module__")));
    producer->masked = producer->masked || home.rfind("numpy.ma", 0) == 0;
  }
  if (torch) producer->is_negated = handle.attr("is_neg").cast<py::object>().release().ptr();
  const py::object entry = producer_lookup()(handle);
  producer->immutable = entry.attr("immutable").cast<bool>();
  producer->after_write = optional(entry, "after_write");
  producer->zeros_like = optional(entry, "zeros_like");
  return producer;
}

// ---- element types ----------------------------------------------------------------------------

[[noreturn]] void unsupported_dtype(const Place& place, const std::string& dtype) {
  fail(PyExc_TypeError, place, ": dtype " + dtype + supported);
}

/// NumPy's own numbers of its types; bfloat16 is a user type whose number is given at run time.
Scalar numpy_scalar(PyObject* descr, const Place& place) {
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

Scalar dlpack_scalar(DLDataType dtype, const Place& place) {
  if (dtype.lanes == 1) {
    if (dtype.code == kDLFloat && dtype.bits == 32) return Scalar::float32;
    if (dtype.code == kDLFloat && dtype.bits == 64) return Scalar::float64;
    if (dtype.code == kDLFloat && dtype.bits == 16) return Scalar::float16;
    if (dtype.code == kDLBfloat && dtype.bits == 16) return Scalar::bfloat16;
    if (dtype.code == kDLInt && dtype.bits == 8) return Scalar::int8;
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

void import_numpy(PyObject* object, const Place& place, Buffer& out) {
  const auto* array = py::detail::array_proxy(object);
  if (out.producer->masked) {
    fail(PyExc_TypeError, place, " is a masked array, whose mask would be ignored; pass its .data");
  }
  out.scalar = numpy_scalar(array->descr, place);
  out.data = array->data;
  out.readonly = (array->flags & numpy_writeable) == 0;
  set_ndim(array->nd, place, out);
  set_layout(array->dimensions, array->strides, 1, out);
}

void import_dltensor(const DLTensor& tensor, const Place& place, Buffer& out) {
  const auto device = tensor.device.device_type;
  if (device != kDLCPU && device != kDLCUDAHost && device != kDLROCMHost) {
    fail(PyExc_RuntimeError, place,
         " is not in CPU memory (DLPack device type " + std::to_string(device) +
             "); this build of fusedstep has no backend for it");
  }
  out.scalar = dlpack_scalar(tensor.dtype, place);
  out.data = static_cast<char*>(tensor.data) + (tensor.data != nullptr ? tensor.byte_offset : 0);
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

void import_exchange(PyObject* object, const Place& place, Owners& owners, Buffer& out) {
  const DLPackExchangeAPI& api = *out.producer->exchange;
  if (api.dltensor_from_py_object_no_sync != nullptr) {
    DLTensor tensor;
    if (api.dltensor_from_py_object_no_sync(object, &tensor) != 0) {
      py::error_already_set error;
      export_failed(error, place, object);
    }
    return import_dltensor(tensor, place, out);
  }
  DLManagedTensorVersioned* managed = nullptr;
  owners.keep(exporting(object, place, [&]() -> PyObject* {
    if (api.managed_tensor_from_py_object_no_sync(object, &managed) != 0) return nullptr;
    return PyCapsule_New(managed, "managed", delete_managed);
  }));
  out.readonly = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
  import_dltensor(managed->dl_tensor, place, out);
}

/// We never consume a capsule (rename it): as long as it is kept it keeps the memory, and its own
/// destructor gives the memory back.
void import_capsule(py::object capsule, const Place& place, Owners& owners, Buffer& out) {
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
    return import_dltensor(managed->dl_tensor, place, out);
  }
  if (!PyCapsule_IsValid(raw, "dltensor")) {
    fail(PyExc_BufferError, place, ": __dlpack__ gave no DLPack capsule, or a consumed one");
  }
  import_dltensor(
      static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(raw, "dltensor"))->dl_tensor, place,
      out);
}

PyObject* call_dlpack(PyObject* object) {
  const py::object method = py::handle(object).attr("__dlpack__");
  try {
    return method(py::arg("max_version") = py::make_tuple(1, 3)).release().ptr();
  } catch (py::error_already_set& error) {
    const auto text = static_cast<std::string>(py::str(error.value()));
    const bool old = text.find("max_version") != std::string::npos ||
                     text.find("keyword argument") != std::string::npos;
    if (!error.matches(PyExc_TypeError) || !old) throw;
  }
  return PyObject_CallNoArgs(method.ptr());  // a producer from before DLPack 1.0
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
  import_numpy(array.ptr(), place, out);
  out.readonly = true;
  owners.keep(std::move(array));
}

void enter(PyObject* object, const Place& place, Owners& owners, Buffer& out) {
  using Door = Producer::Door;
  switch (out.producer->door) {
    case Door::numpy: return import_numpy(object, place, out);
    case Door::exchange: return import_exchange(object, place, owners, out);
    case Door::function: {
      auto call = [&] { return PyObject_CallOneArg(out.producer->function, object); };
      return import_capsule(exporting(object, place, call), place, owners, out);
    }
    case Door::dlpack: {
      auto call = [&] { return call_dlpack(object); };
      return import_capsule(exporting(object, place, call), place, owners, out);
    }
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
  static const char* const names[] = {"float16", "bfloat16",   "float32",
                                      "float64", "longdouble", "int8"};
  return names[static_cast<int>(scalar)];
}

std::int64_t size_of(Scalar scalar) {
  static constexpr std::int64_t sizes[] = {2, 2, 4, 8, sizeof(long double), 1};
  return sizes[static_cast<int>(scalar)];
}

void set_producer_lookup(py::object lookup) { producer_lookup() = std::move(lookup); }

const Producer& producer_of(PyObject* object) {
  static auto* cache = new std::unordered_map<PyTypeObject*, std::unique_ptr<Producer>>();
  static const Producer* last = nullptr;  // the GIL guards both
  PyTypeObject* const type = Py_TYPE(object);
  if (last != nullptr && last->type == type) return *last;
  auto found = cache->find(type);
  if (found == cache->end()) {
    auto made = make_producer(type);  // runs Python code: the cache may change meanwhile
    found = cache->try_emplace(type, std::move(made)).first;
  }
  last = found->second.get();
  return *last;
}

void import_buffer(PyObject* object, const Place& place, Owners& owners, Buffer& out,
                   const void* plain_at) {
  out.producer = &producer_of(object);
  out.readonly = false;
  enter(object, place, owners, out);
  if (out.numel > 0 && out.data == nullptr) {
    fail(PyExc_BufferError, place,
         ": a " + type_name(Py_TYPE(object)) +
             " without memory of its own (a wrapper, fake or distributed tensor?); pass the "
             "tensor that it holds");
  }
  if (out.producer->is_negated != nullptr && out.data != plain_at) {
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
