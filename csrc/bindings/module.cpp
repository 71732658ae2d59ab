// The module fusedstep._core, as a table of contents. Everything with pybind11, Python.h or DLPack
// in it lives in this folder.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/arrays.hpp"
#include "bindings/c_api.hpp"
#include "bindings/device_result.hpp"
#include "bindings/functional.hpp"
#include "bindings/plan.hpp"
#include "bindings/result.hpp"
#include "cpu/isa.hpp"
#include "cpu/rule_info.hpp"
#include "cpu/threads.hpp"

namespace fusedstep::bindings {

namespace {

#if defined(__clang__)
constexpr const char* compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* compiler = "gcc " __VERSION__;
#endif

py::dict rules() {
  py::dict out;
  int index = 0;
  for (const cpu::RuleInfo& info : cpu::rule_infos()) {
    py::dict entry;
    entry["index"] = index++;
    entry["slots"] = py::tuple(py::cast(info.slots));
    entry["scalars"] = py::tuple(py::cast(info.scalars));
    entry["hypers"] = py::tuple(py::cast(info.hypers));
    entry["coefficients"] = py::tuple(py::cast(info.coefficients));
    out[info.name] = entry;
  }
  return out;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FUSEDSTEP_VERSION;
  info["compiler"] = compiler;
  info["isas"] = cpu::available_isas();
  const py::object find_spec = py::module_::import("importlib.util").attr("find_spec");
  info["cuda"] = !find_spec("fusedstep._cuda").is_none();
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MICRO);
  info["dlpack"] =
      std::to_string(DLPACK_MAJOR_VERSION) + "." + std::to_string(DLPACK_MINOR_VERSION);
  return info;
}

void bind_environment(py::module_& module) {
  module.def("rules", &rules);
  module.def("build_info", &build_info);
  module.def("active_isa", &cpu::active_isa);
  module.def("available_isas", &cpu::available_isas);
  module.def("force_isa",
             [](const std::optional<std::string>& name) { cpu::force_isa(name.value_or("")); });
  module.def("get_num_threads", &cpu::get_num_threads);
  module.def("set_num_threads", &cpu::set_num_threads);
  module.def("thread_runtime", &cpu::thread_runtime);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled core of fusedstep; private.";
  module.attr("__version__") = FUSEDSTEP_VERSION;
  py::register_exception<InternalError>(module, "InternalError", PyExc_RuntimeError);
  bind_environment(module);
  bind_arrays(module);
  bind_result(module);
  bind_device_result(module);
  bind_functional(module);
  bind_plan(module);
  bind_c_api(module);
}

}  // namespace fusedstep::bindings
