#pragma once
#include <pybind11/pybind11.h>

#include "bindings/backend.hpp"
#include "bindings/buffer.hpp"

/// Arguments that are one number, wherever it is kept.
namespace fusedstep::bindings {

/// A number that a step uses.
struct Number {
  double value = 0.0;
  DeviceNumber device;  ///< if it is there, it is read when the step runs, and `value` is nothing

  bool is_on_device() const { return device.data != nullptr; }
};

/// The value of an imported array of one element. Waits for one on a device.
double read_element(PyObject* object, const Place& place, const Buffer& buffer);

/// Imports an array of one element, of a floating-point type or, with `integers`, of any.
Buffer import_one(PyObject* object, const Place& place, bool integers, Owners& owners,
                  StreamChoice* stream);

/// A Python number or an array of one element. One on `device`, if that is no CPU, is left there.
Number parse_number(PyObject* object, const Place& place, bool integers, const Device& device,
                    Owners& owners, StreamChoice* stream);

/// An array of one number on a device, as that device reads it.
DeviceNumber device_number(const Buffer& buffer, const Place& place);

}  // namespace fusedstep::bindings
