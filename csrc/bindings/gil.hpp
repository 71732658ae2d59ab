#pragma once
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <exception>

namespace fusedstep::bindings {

/// Takes the GIL back. When the interpreter is shutting down, Python (before 3.14) ends daemon
/// threads here, by unwinding their stacks: destructors would then drop references without the GIL,
/// and the first noexcept one would abort the process. Such a thread sleeps instead until the
/// process is gone.
inline void take_gil(PyThreadState* state) {
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
}

/// Runs `work`, which must not touch Python objects, without the GIL.
template <class Work>
void without_gil(Work&& work) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  take_gil(state);
  if (error) std::rethrow_exception(error);
}

/// The same for destructors, which also run when the interpreter is about to go.
template <class Work>
void without_gil_if_held(Work&& work) {
  if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) {
    without_gil(work);
  } else {
    work();
  }
}

}  // namespace fusedstep::bindings
