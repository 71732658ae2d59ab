#pragma once
#include "bindings/call.hpp"

namespace fusedstep::bindings {

/// Adds the type `DeviceStepResult` to the module.
void bind_device_result(py::module_& module);

/// What a step on a device did, which is asked of the device when somebody wants to know. `applied`
/// and `skipped` are the state after it in either case, and may be the same dict. `settled`: of a
/// step that has been waited for.
py::object make_device_result(Launched launched, py::dict applied, py::dict skipped, bool settled);

}  // namespace fusedstep::bindings
