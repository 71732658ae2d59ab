#pragma once
#include <cmath>
#include <cstdint>

#include "bindings/errors.hpp"
#include "core/step.hpp"

/// What Python hands over as tuples, with its checks done: hyper-parameters and policies.
namespace fusedstep::bindings {

enum class OnNonfinite : std::uint8_t { propagate, skip, raise };
enum class ClipScope : std::uint8_t { all, group, array };

/// What a step does besides its rows' arithmetic.
struct Policy {
  OnNonfinite on_nonfinite = OnNonfinite::propagate;
  ClipScope clip_scope = ClipScope::all;
  double skip_norm = HUGE_VAL;
};

/// The hyper-parameters of a row as they come from Python.
struct RowSpec {
  Row row{};
  bool measures = false;  ///< has a grad_clip_norm, possibly infinite
  /// Arrays of one element in place of these numbers, or null; borrowed from the tuple.
  PyObject* lr = nullptr;
  PyObject* rescale = nullptr;
};

/// Parses (rescale_grad, maximize, grad_clip_norm, grad_clip_value, *hypers of the rule). In place
/// of rescale_grad and of lr an array may stand, which is read where the parameters are.
RowSpec parse_row(int rule, py::handle tuple);
/// Parses (on_nonfinite, grad_clip_scope, skip_grad_norm).
Policy parse_policy(py::handle tuple);

/// A Python number; what its conversion raises is raised.
double to_double(PyObject* object);

}  // namespace fusedstep::bindings
