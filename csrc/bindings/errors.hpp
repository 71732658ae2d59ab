#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace fusedstep::bindings {

namespace py = pybind11;

/// A bug of ours, as opposed to a mistake of the caller or a lack of the environment.
class InternalError : public std::runtime_error {
 public:
  explicit InternalError(const std::string& what)
      : std::runtime_error(what + "; this is a bug in fusedstep, please report it") {}
};

/// Where we are in the caller's arguments; a linked list on the stack, spelt only in errors.
struct Path {
  const Path* parent;
  PyObject* key;     ///< dict key, or null
  Py_ssize_t index;  ///< index in a sequence if there is no key
};

/// "params['layers'][0]": the place `path` (null: the root) in the argument called `name`.
struct Place {
  const char* name;
  const Path* path;
  std::string spell() const;
};

/// repr of a short scalar or string; for anything else the type's name (never a tensor's repr).
std::string brief(PyObject* object);
std::string type_name(PyTypeObject* type);

/// Raises `type` with "<place><message>".
[[noreturn]] void fail(PyObject* type, const Place& place, const std::string& message);

}  // namespace fusedstep::bindings
