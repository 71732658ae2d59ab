#pragma once
#include <pybind11/pybind11.h>

namespace fusedstep::bindings {

/// Exports the function table that the package's other modules call (core/c_api.hpp).
void bind_c_api(pybind11::module_& module);

}  // namespace fusedstep::bindings
