#include "bindings/result.hpp"

namespace fusedstep::bindings {

namespace {

PyStructSequence_Field fields[] = {
    {"grad_norm",
     "float | None: norm of all gradients after rescale_grad; None if nothing asked for it."},
    {"clip_coef", "float: min(1, grad_clip_norm / grad_norm); the smallest if groups differ."},
    {"skipped", "bool: True if on_nonfinite='skip' or skip_grad_norm left everything as it was."},
    {"state", "dict: splat it into the next functional call; {} from an optimizer object."},
    {"grad_norms", "numpy.ndarray | None: the norm of each array; None if nothing asked for it."},
    {nullptr, nullptr}};

PyStructSequence_Desc description = {
    "fusedstep.StepResult",
    "What a step did.\n\n"
    "Attributes:\n"
    "    grad_norm (float | None): L2 norm of all gradients of the call, after rescale_grad and\n"
    "        before any clipping, accumulated in float64; None if nothing asked for it.\n"
    "    clip_coef (float): the factor of the norm clip, min(1, grad_clip_norm / grad_norm); the\n"
    "        smallest one if groups or arrays are clipped differently.\n"
    "    skipped (bool): True if on_nonfinite='skip' or skip_grad_norm left everything as it was.\n"
    "    state (dict): splat it into the next functional call; {} from an optimizer object.\n"
    "    grad_norms (numpy.ndarray | None): float64, the norm of each array's gradient in the\n"
    "        order of the arrays, after rescale_grad, 0 where there is none; None if nothing "
    "asked\n"
    "        for a norm, or the norm was given.\n"
    "    settled (bool): True; see DeviceStepResult.\n",
    fields, 5};

PyTypeObject* result_type = nullptr;

}  // namespace

void bind_result(py::module_& module) {
  result_type = PyStructSequence_NewType(&description);
  if (result_type == nullptr) throw py::error_already_set();
  const py::handle type(reinterpret_cast<PyObject*>(result_type));
  type.attr("settled") = true;  // nothing has to be waited for: see DeviceStepResult
  module.add_object("StepResult", type);
}

py::object make_result(const StepReport& report, py::object state) {
  PyObject* result = PyStructSequence_New(result_type);
  if (result == nullptr) throw py::error_already_set();
  py::object norm = report.grad_norm ? py::object(py::float_(*report.grad_norm)) : py::none();
  PyStructSequence_SetItem(result, 0, norm.release().ptr());
  PyStructSequence_SetItem(result, 1, PyFloat_FromDouble(report.clip_coef));
  PyStructSequence_SetItem(result, 2, PyBool_FromLong(report.skipped));
  PyStructSequence_SetItem(result, 3, state.release().ptr());
  PyStructSequence_SetItem(result, 4, report.tensor_norms.inc_ref().ptr());
  return py::reinterpret_steal<py::object>(result);
}

}  // namespace fusedstep::bindings
