#include "bindings/producer.hpp"

#include <pybind11/numpy.h>

#include <memory>
#include <unordered_map>

#include "bindings/errors.hpp"

namespace fusedstep::bindings {

namespace {

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
  producer->current_stream = optional(entry, "current_stream");
  return producer;
}

}  // namespace

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

}  // namespace fusedstep::bindings
