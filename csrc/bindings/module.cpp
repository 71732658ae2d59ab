// The module fusedstep._core, as a table of contents. Everything with pybind11, Python.h or DLPack
// in it lives in this folder.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>

#include "bindings/buffer.hpp"
#include "bindings/c_api.hpp"
#include "bindings/functional.hpp"
#include "bindings/plan.hpp"
#include "bindings/result.hpp"
#include "bindings/tree.hpp"
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

/// An array whatever it is, with its memory kept for as long as the caller keeps `owners`.
Buffer import_any(py::handle object, const char* name, Owners& owners) {
  Buffer buffer;
  owners.keep(object.ptr());
  import_buffer(object.ptr(), {name, nullptr}, owners, buffer);
  return buffer;
}

py::tuple describe(py::handle object) {
  Owners owners;
  const Buffer buffer = import_any(object, "array", owners);
  py::tuple shape(buffer.ndim);
  for (int d = 0; d < buffer.ndim; ++d) shape[static_cast<std::size_t>(d)] = buffer.shape[d];
  return py::make_tuple(shape, name_of(buffer.scalar));
}

py::dtype numpy_dtype(Scalar scalar) {
  static const char* const names[] = {"float16", "uint16",     "float32",
                                      "float64", "longdouble", "int8"};
  return py::dtype(names[static_cast<int>(scalar)]);
}

py::array array_view(py::object object, bool writable) {
  auto owners = std::make_unique<Owners>();
  const Buffer buffer = import_any(object, "array", *owners);
  if (writable && buffer.readonly) throw py::buffer_error("array is read-only");
  const py::capsule base(owners.release(), [](void* p) { delete static_cast<Owners*>(p); });
  py::array view(numpy_dtype(buffer.scalar),
                 std::vector<py::ssize_t>(buffer.shape, buffer.shape + buffer.ndim),
                 std::vector<py::ssize_t>(buffer.strides, buffer.strides + buffer.ndim),
                 buffer.data, base);
  if (!writable) view.attr("flags").attr("writeable") = false;
  return view;
}

double read_scalar(py::object object) {
  const py::array view = array_view(std::move(object), false);
  if (view.size() != 1) {
    throw py::value_error("expected one number, got an array of " + std::to_string(view.size()));
  }
  const py::object value = view.attr("reshape")(-1)[py::int_(0)];
  if (view.dtype().kind() != 'u') return value.cast<double>();
  const std::uint32_t bits = value.cast<std::uint32_t>() << 16;  // bfloat16
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return static_cast<double>(wide);
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

void bind_buffers(py::module_& module) {
  module.def("set_producer_lookup", &set_producer_lookup);
  module.def("is_array", [](py::handle object) {
    return producer_of(object.ptr()).door != Producer::Door::none;
  });
  module.def("describe", &describe);
  module.def("array_view", &array_view, py::arg("buffer"), py::kw_only(),
             py::arg("writable") = false);
  module.def("read_scalar", &read_scalar);
  module.def("flatten", &flatten, py::arg("tree"), py::arg("name") = "params");
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled core of fusedstep; private.";
  module.attr("__version__") = FUSEDSTEP_VERSION;
  py::register_exception<InternalError>(module, "InternalError", PyExc_RuntimeError);
  bind_environment(module);
  bind_buffers(module);
  bind_result(module);
  bind_functional(module);
  bind_plan(module);
  bind_c_api(module);
}

}  // namespace fusedstep::bindings
