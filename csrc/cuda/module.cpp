// The module fusedstep._cuda: the function table that the bindings look up when they see the first
// buffer of a GPU, and what there is to say about GPUs. Importing it needs neither a GPU nor a
// driver.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda_runtime_api.h>

#include "core/device.hpp"
#include "cuda/api.hpp"

namespace fusedstep::cuda {
namespace {

constexpr const char* walks[] = {"forward", "backward"};

/// What the runtime knows; asked without the GIL, because the first question wakes the driver.
struct Known {
  int runtime = 0, driver = 0, devices = 0;
  const char* why = nullptr;  ///< nothing can be computed
};

Known ask() {
  Known known;
  if (cudaRuntimeGetVersion(&known.runtime) != cudaSuccess) known.runtime = 0;
  if (cudaDriverGetVersion(&known.driver) != cudaSuccess) known.driver = 0;
  known.why = device_api().status(&known.devices);
  if (known.why) known.devices = 0;
  return known;
}

/// A list of (name, major, minor) with the compute capabilities; null with an error set.
PyObject* list_devices(int devices) {
  PyObject* list = PyList_New(devices);
  for (int i = 0; list && i < devices; ++i) {
    cudaDeviceProp properties;
    const bool known = cudaGetDeviceProperties(&properties, i) == cudaSuccess;
    PyObject* entry =
        known ? Py_BuildValue("(sii)", properties.name, properties.major, properties.minor)
              : Py_BuildValue("(sii)", "unknown", 0, 0);
    if (entry) {
      PyList_SET_ITEM(list, i, entry);
    } else {
      Py_CLEAR(list);
    }
  }
  return list;
}

PyObject* info(PyObject* /*module*/, PyObject* /*none*/) {
  Known known;
  Py_BEGIN_ALLOW_THREADS;
  known = ask();
  Py_END_ALLOW_THREADS;
  PyObject* devices = list_devices(known.devices);
  if (!devices) return nullptr;
  return Py_BuildValue("{s:s,s:i,s:i,s:N,s:z}", "architectures", FUSEDSTEP_CUDA_ARCHITECTURES,
                       "runtime", known.runtime, "driver", known.driver, "devices", devices, "why",
                       known.why);
}

/// The walk that a name stands for; -1 with an error set.
int walk_of(PyObject* name) {
  for (int backward = 0; backward < 2; ++backward)
    if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, walks[backward]) == 0)
      return backward;
  PyErr_SetString(PyExc_ValueError, "walk: expected 'forward' or 'backward'");
  return -1;
}

PyObject* set_walk(PyObject* /*module*/, PyObject* name) {
  const int backward = walk_of(name);
  return backward < 0 ? nullptr : PyUnicode_FromString(walks[set_backward(backward != 0)]);
}

/// 0, or -1 with an error set.
int fill(PyObject* module) {
  PyObject* capsule =
      PyCapsule_New(const_cast<DeviceApi*>(&device_api()), DeviceApi::capsule, nullptr);
  const int failed = PyModule_AddObjectRef(module, DeviceApi::attribute, capsule);
  Py_XDECREF(capsule);
  return failed;
}

PyMethodDef methods[] = {
    {"info", info, METH_NOARGS,
     "Architectures, versions as CUDA numbers them (0: none), devices, and why none is usable."},
    {"set_walk", set_walk, METH_O,
     "Sets in which order steps visit memory, 'forward' or 'backward', for measurements: the bits "
     "are the same. Returns the order that was set before."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_cuda",
                          "Steps on NVIDIA GPUs; private.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace
}  // namespace fusedstep::cuda

PyMODINIT_FUNC PyInit__cuda() {
  PyObject* module = PyModule_Create(&fusedstep::cuda::definition);
  if (module && fusedstep::cuda::fill(module) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
