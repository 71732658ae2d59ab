#include "bindings/row.hpp"

#include <cstring>
#include <string>

#include "bindings/producer.hpp"
#include "cpu/rule_info.hpp"

namespace fusedstep::bindings {

double to_double(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

namespace {

double limit(PyObject* object) { return object == Py_None ? HUGE_VAL : to_double(object); }

/// The position of a string among `options`; the caller has checked it already.
template <std::size_t n>
int option(PyObject* text, const char* const (&options)[n]) {
  for (int k = 0; k < static_cast<int>(n); ++k) {
    if (PyUnicode_Check(text) && PyUnicode_CompareWithASCIIString(text, options[k]) == 0) return k;
  }
  throw py::value_error(std::string("expected '") + options[0] + "' or the like, got " +
                        brief(text));
}

/// The item as an array of a number that is not for the host to read, or null.
PyObject* array_in(PyObject* item) {
  if (PyFloat_CheckExact(item)) return nullptr;
  const auto door = producer_of(item).door;
  return door == Producer::Door::none || door == Producer::Door::number ? nullptr : item;
}

}  // namespace

RowSpec parse_row(int rule, py::handle tuple) {
  constexpr std::size_t head = 4;
  const cpu::RuleInfo& info = cpu::rule_infos().at(static_cast<std::size_t>(rule));
  PyObject* items = tuple.ptr();
  if (!PyTuple_Check(items) ||
      PyTuple_GET_SIZE(items) != static_cast<Py_ssize_t>(head + info.hypers.size())) {
    throw InternalError("a row of hyper-parameters has the wrong form");
  }
  RowSpec spec;
  Row& row = spec.row;
  row.rule = rule;
  spec.rescale = array_in(PyTuple_GET_ITEM(items, 0));
  row.rescale_grad = spec.rescale != nullptr ? 1.0 : to_double(PyTuple_GET_ITEM(items, 0));
  row.sign = to_double(PyTuple_GET_ITEM(items, 1)) != 0 ? -1.0 : 1.0;
  row.clip_norm = limit(PyTuple_GET_ITEM(items, 2));
  row.clip_value = limit(PyTuple_GET_ITEM(items, 3));
  spec.measures = PyTuple_GET_ITEM(items, 2) != Py_None;
  const bool has_lr = !info.hypers.empty() && std::strcmp(info.hypers[0], "lr") == 0;
  if (has_lr) spec.lr = array_in(PyTuple_GET_ITEM(items, head));
  for (std::size_t k = spec.lr != nullptr ? 1 : 0; k < info.hypers.size(); ++k) {
    row.hyper[k] = to_double(PyTuple_GET_ITEM(items, static_cast<Py_ssize_t>(head + k)));
  }
  return spec;
}

Policy parse_policy(py::handle tuple) {
  PyObject* items = tuple.ptr();
  if (!PyTuple_Check(items) || PyTuple_GET_SIZE(items) != 3) {
    throw InternalError("a policy has the wrong form");
  }
  Policy policy;
  policy.on_nonfinite =
      static_cast<OnNonfinite>(option(PyTuple_GET_ITEM(items, 0), {"propagate", "skip", "raise"}));
  policy.clip_scope =
      static_cast<ClipScope>(option(PyTuple_GET_ITEM(items, 1), {"all", "group", "array"}));
  policy.skip_norm = limit(PyTuple_GET_ITEM(items, 2));
  return policy;
}

}  // namespace fusedstep::bindings
