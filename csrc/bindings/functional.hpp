#pragma once
#include <pybind11/pybind11.h>

namespace fusedstep::bindings {

/// Adds the steps on trees that the caller passes whole: `step`, `step_coefficients`,
/// `sum_squares`.
void bind_functional(pybind11::module_& module);

}  // namespace fusedstep::bindings
