#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/errors.hpp"
#include "bindings/producer.hpp"

/// The import layer: any array -> pointer, device, shape, strides. Nothing is copied.
namespace fusedstep::bindings {

constexpr int max_ndim = 64;  // NumPy's and torch's limit

/// Element types that may come in; all others are refused by name. Those after int8 are for single
/// numbers.
enum class Scalar : std::uint8_t {
  float16,
  bfloat16,
  float32,
  float64,
  longdouble,
  int8,
  int32,
  int64,
  boolean
};

/// Where memory is. What the CPU can read, pinned memory too, is the CPU's.
struct Device {
  enum class Type : std::uint8_t { cpu, cuda };
  Type type = Type::cpu;
  int id = 0;

  bool is_cpu() const { return type == Type::cpu; }
  bool operator==(const Device& o) const { return type == o.type && id == o.id; }
  bool operator!=(const Device& o) const { return !(*this == o); }
  std::string spell() const;  ///< "cpu" or "cuda:0"
};

const char* name_of(Scalar scalar);
std::int64_t size_of(Scalar scalar);

/// Keeps imported memory alive until cleared. The GIL must be held.
class Owners {
 public:
  Owners() = default;
  Owners(const Owners&) = delete;
  Owners& operator=(const Owners&) = delete;
  ~Owners() { clear(); }
  void keep(PyObject* object) { objects_.push_back(Py_NewRef(object)); }
  void keep(py::object&& object) { objects_.push_back(object.release().ptr()); }
  void clear() {
    for (PyObject* object : objects_) Py_DECREF(object);
    objects_.clear();
  }

 private:
  std::vector<PyObject*> objects_;
};

/// An array's memory as its producer describes it; valid as long as the owners are kept.
struct Buffer {
  void* data;
  const Producer* producer;
  std::int64_t numel;
  int ndim;
  Scalar scalar;
  Device device;
  bool readonly;
  std::int64_t shape[max_ndim];
  std::int64_t strides[max_ndim];  ///< bytes; anything where a dimension has one element

  bool is_row_major() const;
  bool is_dense() const;  ///< distinct elements that fill one block, in any dimension order
  bool same_shape(const Buffer& other) const;
  bool same_order(const Buffer& other) const;  ///< both dense, or equal strides: same memory order
  std::string shape_text() const;              ///< as Python prints it
};

class StreamChoice;

struct ImportOptions {
  /// The memory at which this very object was found not to be lazily negated before; it is not
  /// asked again then, which costs as much as the rest.
  const void* plain_at = nullptr;
  bool integers = false;           ///< also int32, int64 and bool
  StreamChoice* stream = nullptr;  ///< in whose order memory of a device will be used; null: none's
};

/// Imports `object`. Raises TypeError, BufferError or RuntimeError that start with the place.
void import_buffer(PyObject* object, const Place& place, Owners& owners, Buffer& out,
                   const ImportOptions& options = {});

}  // namespace fusedstep::bindings
