#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/buffer.hpp"

/// Streams of devices: whose work a step comes after, and whose it comes before.
namespace fusedstep::bindings {

/// A stream of a CUDA device as its handle, a cudaStream_t. Null is the legacy default stream.
struct Stream {
  void* handle = nullptr;
  py::object owner;  ///< without which the handle may become invalid; or null
};

/// The stream that `object` is or holds: an integer handle, or an object with `__cuda_stream__()`,
/// `.cuda_stream` or `.ptr`. Raises TypeError or ValueError that start with `name`.
Stream parse_stream(py::handle object, const char* name);

/// The stream on which the array's library works now: what its exchange table says, or its entry
/// in `fusedstep.buffers`, or `__cuda_array_interface__`. `known` tells whether any of them does;
/// otherwise it is the default stream.
Stream current_stream(PyObject* array, const Producer& producer, int device, bool* known);

/// The stream of a call: the given one, else the current one of the first array that is on a
/// device.
class StreamChoice {
 public:
  /// The argument `stream`, or None.
  void give(py::handle stream);
  void clear() { *this = StreamChoice(); }

  /// To be told every array on a device.
  void meet(PyObject* array, const Producer& producer, int device);

  /// What `__dlpack__` of an array is called with: -1, which asks for nothing, unless its library
  /// works on another stream, or on one that is not known: then it has to wait for itself.
  std::intptr_t requested_of(PyObject* array, const Producer& producer, int device);

  bool is_given() const { return given_; }
  bool is_chosen() const { return chosen_; }
  const Stream& stream() const { return stream_; }
  /// The first one on a device; or null.
  const py::object& array() const { return array_; }

 private:
  struct Current {
    const Producer* producer;
    void* handle;
    bool known;
  };
  const Current& current(PyObject* array, const Producer& producer, int device);

  Stream stream_;
  py::object array_;
  bool given_ = false, chosen_ = false;
  std::vector<Current> currents_;  ///< of the producers met so far
};

}  // namespace fusedstep::bindings
