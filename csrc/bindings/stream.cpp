#include "bindings/stream.hpp"

#include <pybind11/pybind11.h>

namespace fusedstep::bindings {

namespace {

/// The first two are the legacy default stream; DLPack does not know the first. The third is one
/// stream for each thread.
constexpr std::intptr_t cuda_default = 0, dlpack_default = 1, per_thread = 2;

[[noreturn]] void no_stream(py::handle object, const char* name) {
  fail(PyExc_TypeError, {name, nullptr},
       ": expected a stream of CUDA (an integer handle, or an object with __cuda_stream__(), "
       ".cuda_stream or .ptr), got " +
           brief(object.ptr()));
}

bool is_integer(py::handle object) {
  return PyLong_Check(object.ptr()) && !PyBool_Check(object.ptr());
}

/// Work of one thread would not be in order with that of another, and both streams are called the
/// same.
void refuse_per_thread(std::intptr_t handle, const char* name) {
  if (handle != per_thread) return;
  fail(PyExc_ValueError, {name, nullptr},
       ": the per-thread default stream is not supported; use a stream of its own");
}

void* handle_of(py::handle number, const char* name) {
  const auto value = PyLong_AsLongLong(number.ptr());
  const bool failed = value == -1 && PyErr_Occurred() != nullptr;
  if (failed) PyErr_Clear();
  if (failed || value < 0) {
    fail(PyExc_ValueError, {name, nullptr},
         ": " + brief(number.ptr()) + " is no handle of a stream");
  }
  refuse_per_thread(value, name);
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  return reinterpret_cast<void*>(value == dlpack_default ? cuda_default : value);
}

/// The integer in what names a stream; a null object if it names none.
py::object number_of(py::handle object) {
  if (is_integer(object)) return py::reinterpret_borrow<py::object>(object);
  if (py::hasattr(object, "__cuda_stream__")) {
    const py::object pair = object.attr("__cuda_stream__")();
    const bool fits = PyTuple_Check(pair.ptr()) && PyTuple_GET_SIZE(pair.ptr()) == 2;
    return fits ? py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(pair.ptr(), 1))
                : py::object();
  }
  for (const char* const name : {"cuda_stream", "ptr"}) {
    const py::object value = py::getattr(object, name, py::none());
    if (is_integer(value)) return value;
  }
  return py::object();
}

/// The stream of `__cuda_array_interface__`; a null object if it says nothing.
py::object interface_stream(PyObject* array) {
  const py::object interface = py::getattr(array, "__cuda_array_interface__", py::none());
  if (!PyDict_Check(interface.ptr())) return py::object();
  PyObject* const stream = PyDict_GetItemString(interface.ptr(), "stream");
  const bool there = stream != nullptr && is_integer(stream);
  return there ? py::reinterpret_borrow<py::object>(stream) : py::object();
}

}  // namespace

Stream parse_stream(py::handle object, const char* name) {
  const py::object number = number_of(object);
  if (!number || !is_integer(number)) no_stream(object, name);
  return {handle_of(number, name), py::reinterpret_borrow<py::object>(object)};
}

Stream current_stream(PyObject* array, const Producer& producer, int device, bool* known) {
  *known = true;
  const DLPackExchangeAPI* const api = producer.exchange;
  if (api != nullptr && api->current_work_stream != nullptr) {
    Stream stream;
    if (api->current_work_stream(kDLCUDA, device, &stream.handle) != 0) {
      throw py::error_already_set();
    }
    refuse_per_thread(reinterpret_cast<std::intptr_t>(stream.handle), "the current stream");
    return stream;
  }
  if (producer.current_stream != nullptr) {
    return parse_stream(py::handle(producer.current_stream)(device), "the current stream");
  }
  if (const py::object number = interface_stream(array)) {
    return {handle_of(number, "__cuda_array_interface__['stream']"), py::object()};
  }
  *known = false;
  return {};
}

void StreamChoice::give(py::handle stream) {
  if (stream.is_none()) return;
  stream_ = parse_stream(stream, "stream");
  given_ = chosen_ = true;
}

void StreamChoice::meet(PyObject* array, const Producer& producer, int device) {
  if (!array_) array_ = py::reinterpret_borrow<py::object>(array);
  if (!chosen_) current(array, producer, device);
}

const StreamChoice::Current& StreamChoice::current(PyObject* array, const Producer& producer,
                                                   int device) {
  for (const Current& known : currents_) {
    if (known.producer == &producer) return known;
  }
  bool known = false;
  Stream stream = current_stream(array, producer, device, &known);
  currents_.push_back({&producer, stream.handle, known});
  if (!chosen_) stream_ = std::move(stream);
  chosen_ = true;
  return currents_.back();
}

std::intptr_t StreamChoice::requested_of(PyObject* array, const Producer& producer, int device) {
  if (given_) return -1;  // the caller sees to it that work is in order
  const Current& own = current(array, producer, device);
  if (own.known && own.handle == stream_.handle) return -1;
  const auto handle = reinterpret_cast<std::intptr_t>(stream_.handle);
  return handle == cuda_default ? dlpack_default : handle;
}

}  // namespace fusedstep::bindings
