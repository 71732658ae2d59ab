#include "bindings/errors.hpp"

namespace fusedstep::bindings {

namespace {

void append(std::string& text, const Path* path) {
  if (path == nullptr) return;
  append(text, path->parent);
  text += '[';
  text += path->key != nullptr ? static_cast<std::string>(py::repr(path->key))
                               : std::to_string(path->index);
  text += ']';
}

}  // namespace

std::string Place::spell() const {
  std::string text = name;
  append(text, path);
  return text;
}

std::string type_name(PyTypeObject* type) {
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  const auto name = py::cast<std::string>(handle.attr("__qualname__"));
  const auto module = py::cast<std::string>(py::str(handle.attr("__module__")));
  return module == "builtins" ? name : module + "." + name;
}

std::string brief(PyObject* object) {
  constexpr std::size_t longest = 40;
  const bool scalar =
      PyFloat_Check(object) || PyLong_Check(object) || PyUnicode_Check(object) || object == Py_None;
  if (scalar) {
    const auto text = static_cast<std::string>(py::repr(object));
    if (text.size() <= longest) return text;
  }
  return "a " + type_name(Py_TYPE(object));
}

void fail(PyObject* type, const Place& place, const std::string& message) {
  PyErr_SetString(type, (place.spell() + message).c_str());
  throw py::error_already_set();
}

}  // namespace fusedstep::bindings
