#pragma once
#include "bindings/call.hpp"

namespace fusedstep::bindings {

/// Adds the type `StepResult` to the module.
void bind_result(py::module_& module);

/// A StepResult; `state` is the dict to splat into the next call.
py::object make_result(const StepReport& report, py::object state);

}  // namespace fusedstep::bindings
