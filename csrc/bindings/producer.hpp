#pragma once
#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <cstdint>

/// What is known of the types of arrays.
namespace fusedstep::bindings {

namespace py = pybind11;

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
  PyObject* is_negated = nullptr;      ///< torch: lazy negation that no export reports
  PyObject* after_write = nullptr;     ///< told what was written: list -> None; or null
  PyObject* zeros_like = nullptr;      ///< (array, dtype name) -> array
  PyObject* current_stream = nullptr;  ///< (number of a device) -> its stream, see stream.hpp
};

/// The type's entry; asks the table in `fusedstep.buffers` on first sight.
const Producer& producer_of(PyObject* object);
void set_producer_lookup(py::object lookup);

}  // namespace fusedstep::bindings
