#pragma once
#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/errors.hpp"

/// The import layer: any array of CPU memory -> pointer, shape, strides. Nothing is copied.
namespace fusedstep::bindings {

constexpr int max_ndim = 64;  // NumPy's and torch's limit

/// Element types that may come in; all others are refused by name.
enum class Scalar : std::uint8_t { float16, bfloat16, float32, float64, longdouble, int8 };

const char* name_of(Scalar scalar);
std::int64_t size_of(Scalar scalar);

/// How a Python type hands out its memory; found once per exact type.
struct Producer {
  enum class Door : std::uint8_t {
    none,      ///< no array
    number,    ///< Python or NumPy scalar: a gradient of a 0-d parameter, never an output
    numpy,     ///< the array struct
    exchange,  ///< DLPack C exchange table
    function,  ///< a function that makes a capsule (torch before 2.10)
    dlpack,    ///< __dlpack__, versioned or legacy
    protocol,  ///< buffer protocol
  };
  PyTypeObject* type = nullptr;  ///< held, so that the address stays this type's
  Door door = Door::none;
  bool immutable = false;  ///< writing into it is undefined behaviour, whatever its flags say
  bool masked = false;     ///< numpy.ma: has a mask that a flat pointer would ignore
  const DLPackExchangeAPI* exchange = nullptr;
  PyObject* function = nullptr;
  PyObject* is_negated = nullptr;   ///< torch: lazy negation that no export reports
  PyObject* after_write = nullptr;  ///< told what was written: list -> None; or null
  PyObject* zeros_like = nullptr;   ///< (array, dtype name) -> array
};

/// The type's entry; asks the table in `fusedstep.buffers` on first sight.
const Producer& producer_of(PyObject* object);
void set_producer_lookup(py::object lookup);

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
  bool readonly;
  std::int64_t shape[max_ndim];
  std::int64_t strides[max_ndim];  ///< bytes; anything where a dimension has one element

  bool is_row_major() const;
  bool is_dense() const;  ///< distinct elements that fill one block, in any dimension order
  bool same_shape(const Buffer& other) const;
  bool same_order(const Buffer& other) const;  ///< both dense, or equal strides: same memory order
  std::string shape_text() const;              ///< as Python prints it
};

/// Imports `object`. Raises TypeError, BufferError or RuntimeError that start with the place.
/// `plain_at`: the memory at which this very object was found not to be lazily negated before; it
/// is not asked again then, which costs as much as the rest.
void import_buffer(PyObject* object, const Place& place, Owners& owners, Buffer& out,
                   const void* plain_at = nullptr);

}  // namespace fusedstep::bindings
