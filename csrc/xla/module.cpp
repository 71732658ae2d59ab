// The module fusedstep._xla: the handlers as capsules, which fusedstep.jax registers. It is
// compiled against the oldest headers of XLA's FFI that are supported, because newer runtimes run
// such handlers and older ones do not.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "xla/handlers.hpp"
#include "xla/settings.hpp"

namespace fusedstep::xla {

const CApi* core = nullptr;

namespace {

struct Target {
  const char* platform;
  const char* name;
  XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*);
};

/// Another platform is another three lines.
constexpr Target targets[] = {
    {"cpu", "fusedstep.norms", fusedstep_norms_cpu},
    {"cpu", "fusedstep.settle", fusedstep_settle_cpu},
    {"cpu", "fusedstep.update", fusedstep_update_cpu},
};

/// A list of (platform, name, capsule); null with an error set.
PyObject* make_targets() {
  PyObject* list = PyList_New(0);
  for (const Target& target : targets) {
    PyObject* capsule = PyCapsule_New(reinterpret_cast<void*>(target.handler), nullptr, nullptr);
    PyObject* entry =
        capsule ? Py_BuildValue("ssN", target.platform, target.name, capsule) : nullptr;
    const bool done = list && entry && PyList_Append(list, entry) == 0;
    Py_XDECREF(entry);
    if (!done) {
      Py_XDECREF(list);
      return nullptr;
    }
  }
  return list;
}

/// The function table of _core; null with an ImportError set.
const CApi* find_core() {
  PyObject* module = PyImport_ImportModule(CApi::module);
  PyObject* capsule = module ? PyObject_GetAttrString(module, CApi::attribute) : nullptr;
  const void* pointer = capsule ? PyCapsule_GetPointer(capsule, CApi::capsule) : nullptr;
  Py_XDECREF(capsule);
  Py_XDECREF(module);
  if (!pointer) return nullptr;
  const auto* api = static_cast<const CApi*>(pointer);
  const char* mismatch = api->mismatch();
  if (!mismatch) return api;
  PyErr_Format(PyExc_ImportError,
               "fusedstep._xla and fusedstep._core are of different builds (%s); install fusedstep "
               "anew",
               mismatch);
  return nullptr;
}

/// 0, or -1 with an error set.
int fill(PyObject* module) {
  core = find_core();
  if (!core) return -1;
  PyObject* version = Py_BuildValue("ii", XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  const int failed = PyModule_AddObjectRef(module, "FFI_VERSION", version);
  Py_XDECREF(version);
  if (failed) return -1;
  PyObject* list = make_targets();
  const int unlisted = PyModule_AddObjectRef(module, "TARGETS", list);
  Py_XDECREF(list);
  if (unlisted) return -1;
  if (PyModule_AddIntConstant(module, "MAX_HYPERS", max_hypers)) return -1;
  return PyModule_AddIntConstant(module, "NUM_SETTLED", num_settled);
}

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_xla",
                          "XLA handlers of fusedstep; private.",
                          -1,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace
}  // namespace fusedstep::xla

PyMODINIT_FUNC PyInit__xla() {
  PyObject* module = PyModule_Create(&fusedstep::xla::definition);
  if (module && fusedstep::xla::fill(module) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
