#pragma once
#include <pybind11/pybind11.h>

namespace fusedstep::bindings {

/// Adds what Python asks of single arrays, and trees as lists.
void bind_arrays(pybind11::module_& module);

}  // namespace fusedstep::bindings
