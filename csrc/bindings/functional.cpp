#include "bindings/functional.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <limits>

#include "bindings/call.hpp"
#include "bindings/device_result.hpp"
#include "bindings/result.hpp"
#include "bindings/tree.hpp"

namespace fusedstep::bindings {

namespace {

constexpr const char* params_name = "params";
constexpr const char* grads_name = "grads";
constexpr const char* copy_name = "param_copy";

/// The arguments of one functional call, as trees. Where they are in the forest is fixed.
struct Arguments {
  static constexpr int param = 0, grad = 1, copy = 2, state = 3;

  Arguments(int rule, py::handle params_, py::handle grads_, const py::tuple& states_,
            py::handle copy_)
      : slots(cpu::rule_infos().at(static_cast<std::size_t>(rule)).slots),
        scalars(cpu::rule_infos().at(static_cast<std::size_t>(rule)).scalars),
        params(as_tree(params_)),
        grads(as_tree(grads_)),
        copies(as_tree(copy_)) {
    if (states_.size() != slots.size()) throw InternalError("wrong number of state trees");
    for (const auto tree : states_) states.push_back(as_tree(tree));
    forest.add(params_name, params.ptr());
    forest.add(grads_name, grads.ptr());
    forest.add(copy_name, copies.ptr());
    for (std::size_t k = 0; k < slots.size(); ++k) forest.add(slots[k], states[k].ptr());
    check_roots();
  }

  void check_roots() const {
    if (grads.is_none()) {
      fail(PyExc_TypeError, {grads_name, nullptr}, ": expected arrays like params, got None");
    }
    if (PyFloat_Check(params.ptr()) || PyLong_Check(params.ptr())) {
      fail(
          PyExc_TypeError, {params_name, nullptr},
          ": got " + brief(params.ptr()) + "; params comes first, write lr=" + brief(params.ptr()));
    }
  }

  std::string spell(std::size_t leaf, Role role, int slot) const {
    if (role == Role::scalar) return scalars[static_cast<std::size_t>(slot)];
    const char* const names[] = {params_name, grads_name, copy_name,
                                 role == Role::state ? slots[static_cast<std::size_t>(slot)] : ""};
    return spell_leaf(params, names[static_cast<int>(role)], leaf);
  }

  const std::vector<const char*>& slots;
  const std::vector<const char*>& scalars;
  py::object params, grads, copies;
  std::vector<py::object> states;
  Forest forest;
};

/// Fills a call from the walk over the arguments.
class Filler final : public LeafVisitor {
 public:
  /// `progress` is how far all leaves are.
  Filler(Call& call, const Arguments& arguments, const RowSpec& spec, const Progress& progress)
      : call_(call), arguments_(arguments), spec_(spec), progress_(progress) {
    call_.announce(spec);
  }

  void leaf(PyObject* const* nodes, const Path* path) override {
    const std::size_t index = count_++;
    if (nodes[Arguments::grad] == nullptr) return;  // no gradient: left alone
    Leaf leaf{nodes[Arguments::param], nodes[Arguments::grad], nodes[Arguments::copy], {}};
    for (std::size_t k = 0; k < arguments_.slots.size(); ++k) {
      leaf.states[k] = nodes[Arguments::state + static_cast<int>(k)];
    }
    const bool first = !arguments_.slots.empty() && leaf.states[0] == nullptr;
    call_.add_leaf(index, leaf, {params_name, grads_name, copy_name, path}, row(first));
  }

  std::size_t count() const { return count_; }
  /// The rows of leaves with and without state, where there are any; the number of rows.
  int num_rows() const { return (rows_[0] >= 0 ? 1 : 0) + (rows_[1] >= 0 ? 1 : 0); }

 private:
  std::uint32_t row(bool first) {
    std::int64_t& known = rows_[first ? 1 : 0];
    if (known < 0) known = call_.add_row(spec_, {progress_.step, first, progress_.product});
    return static_cast<std::uint32_t>(known);
  }

  Call& call_;
  const Arguments& arguments_;
  const RowSpec& spec_;
  const Progress progress_;
  std::size_t count_ = 0;
  std::int64_t rows_[2] = {-1, -1};
};

/// How many leaves there are, and rows.
struct Filled {
  std::size_t leaves;
  int rows;
};

Filled fill(Call& call, const Arguments& arguments, const RowSpec& spec, const Progress& progress) {
  Filler filler(call, arguments, spec, progress);
  walk(arguments.forest, filler);
  if (filler.count() == 0) {
    throw py::value_error("params is empty (an exhausted generator?)");
  }
  return {filler.count(), filler.num_rows()};
}

/// The tree of one slot after the step: what was passed, or a tree with the created buffers in it.
py::object state_after(const Arguments& arguments, const Call& call, std::size_t slot,
                       std::size_t leaves) {
  const bool made = std::any_of(call.created().begin(), call.created().end(),
                                [&](const auto& c) { return std::size_t(c.slot) == slot; });
  if (!made) return arguments.states[slot];
  std::vector<PyObject*> buffers(leaves, nullptr);
  if (!arguments.states[slot].is_none()) {
    class Collector final : public LeafVisitor {
     public:
      explicit Collector(std::vector<PyObject*>& out) : out_(out) {}
      void leaf(PyObject* const* nodes, const Path*) override { out_[at_++] = nodes[1]; }

     private:
      std::vector<PyObject*>& out_;
      std::size_t at_ = 0;
    } collector(buffers);
    Forest forest;
    forest.add(params_name, arguments.params.ptr());
    forest.add(arguments.slots[slot], arguments.states[slot].ptr());
    walk(forest, collector);
  }
  for (const CreatedState& created : call.created()) {
    if (std::size_t(created.slot) == slot) buffers[created.leaf] = created.buffer.ptr();
  }
  return rebuild(arguments.params, buffers);
}

/// The scalars of a rule, (steps applied, product so far), as they were passed.
class Scalars {
 public:
  explicit Scalars(const py::tuple& given) : given_(given) {}

  /// Those of the step to be taken; an array in place of a number stays what it is.
  Progress progress() const {
    Progress progress{1, false, 1.0};
    if (is_number(0)) progress.step = py::cast<std::int64_t>(given_[0]) + 1;
    if (is_number(1)) progress.product = py::cast<double>(given_[1]);
    return progress;
  }

  /// Tells a call on a device of the arrays among them. On the CPU they are numbers (see codegen).
  void add_to(Call& call, const std::vector<const char*>& names, int rows) const {
    if (is_plain()) return;
    DeviceNumber numbers[max_scalars] = {};
    for (std::size_t k = 0; k < given_.size(); ++k) {
      if (is_number(k)) mixed(names);
      numbers[k] = call.add_number(py::object(given_[k]).ptr(), {names[k], nullptr}, int(k));
    }
    for (int row = 0; row < rows; ++row) {
      call.set_numbers(static_cast<std::uint32_t>(row), numbers[0], numbers[1], row == 0);
    }
  }

  /// After the step of `row`, if it was applied.
  void put_into(py::dict& state, const Row& row, bool applied) const {
    const auto& names = cpu::rule_infos()[static_cast<std::size_t>(row.rule)].scalars;
    for (std::size_t k = 0; k < names.size(); ++k) {
      state[names[k]] = given_[k];
      if (!applied || !is_number(k)) continue;
      state[names[k]] = k == 0 ? py::object(py::int_(row.progress.step))
                               : py::object(py::float_(cpu::product_after(row)));
    }
  }

  /// No arrays are among them.
  bool is_plain() const {
    bool plain = true;
    for (std::size_t k = 0; k < given_.size(); ++k) plain = plain && is_number(k);
    return plain;
  }
  bool empty() const { return given_.empty(); }

 private:
  bool is_number(std::size_t k) const {
    if (k >= given_.size()) return false;
    PyObject* const item = PyTuple_GET_ITEM(given_.ptr(), static_cast<Py_ssize_t>(k));
    return PyLong_Check(item) || PyFloat_Check(item);
  }

  [[noreturn]] static void mixed(const std::vector<const char*>& names) {
    throw py::type_error(std::string(names[0]) + " and " + names[1] +
                         ": pass both as arrays on the device, or both as numbers");
  }

  const py::tuple& given_;
};

/// The state after a step. A skipped first step has not happened: its state is not handed out.
py::dict state_of(const Arguments& arguments, const Call& call, const Scalars& scalars,
                  const Row& row, std::size_t leaves, bool applied) {
  py::dict state;
  scalars.put_into(state, row, applied);
  for (std::size_t k = 0; k < arguments.slots.size(); ++k) {
    state[arguments.slots[k]] =
        applied ? state_after(arguments, call, k, leaves) : arguments.states[k];
  }
  return state;
}

py::object launch(Call& call, const Arguments& arguments, const Scalars& scalars,
                  const RowSpec& spec, const Policy& policy, const Filled& filled,
                  const Speller& spell) {
  const bool raises = policy.on_nonfinite == OnNonfinite::raise;
  if (raises) {
    refuse_capture(call.gpu(), call.stream(), "on_nonfinite='raise' cannot read a result");
  }
  Launched launched = call.launch(Workspace::of_functions(call.gpu(), call.stream()), nullptr);
  if (raises && launched.report) call.wait(launched, spell);
  call.tell_producers();
  const bool matters = !call.created().empty() || (!scalars.empty() && scalars.is_plain());
  const auto state = [&](bool applied) {
    return state_of(arguments, call, scalars, spec.row, filled.leaves, applied);
  };
  const py::dict applied = state(true);
  return make_device_result(std::move(launched), applied, matters ? state(false) : applied, raises);
}

py::object step(int rule, py::handle params, py::handle grads, const py::tuple& states,
                const py::tuple& given_scalars, py::handle row, py::handle policy,
                py::handle grad_norm, py::handle param_copy, py::handle found_inf,
                py::handle stream) {
  RowSpec spec = parse_row(rule, row);
  const Scalars scalars(given_scalars);
  spec.row.progress = scalars.progress();
  const Arguments arguments(rule, params, grads, states, param_copy);
  const Call::Handle call = Call::make(stream);
  const Filled filled = fill(*call, arguments, spec, spec.row.progress);
  const Speller spell = [&](std::size_t leaf, Role role, int slot) {
    return arguments.spell(leaf, role, slot);
  };
  const StepArguments options{parse_policy(policy), grad_norm, found_inf, py::none()};
  scalars.add_to(*call, arguments.scalars, filled.rows);
  call->prepare(options, filled.leaves, spell);
  if (!call->device().is_cpu()) {
    return launch(*call, arguments, scalars, spec, options.policy, filled, spell);
  }
  const StepReport report = call->run(spell);
  if (!report.skipped) call->tell_producers();
  return make_result(report,
                     state_of(arguments, *call, scalars, spec.row, filled.leaves, !report.skipped));
}

void step_coefficients(int rule, py::handle params, py::handle grads, const py::tuple& states,
                       const std::vector<double>& coefficients) {
  RowSpec spec;
  spec.row.rule = rule;
  spec.row.coefficients_given = true;
  spec.row.rescale_grad = spec.row.sign = 1.0;
  spec.row.clip_norm = spec.row.clip_value = std::numeric_limits<double>::infinity();
  if (coefficients.size() !=
      cpu::rule_infos().at(static_cast<std::size_t>(rule)).coefficients.size()) {
    throw py::value_error("wrong number of coefficients");
  }
  std::copy(coefficients.begin(), coefficients.end(), spec.row.hyper);
  Arguments arguments(rule, params, grads, states, py::none());
  arguments.forest.tuples_are_leaves = true;  // block-wise states are pairs
  const Call::Handle call = Call::make();
  call->allow_block_states();
  const Filled filled = fill(*call, arguments, spec, Progress{1, false});
  const Speller spell = [&](std::size_t leaf, Role role, int slot) {
    return arguments.spell(leaf, role, slot);
  };
  call->prepare({}, filled.leaves, spell);
  if (call->device().is_cpu()) {
    call->run(spell);
  } else {
    call->launch(Workspace::of_functions(call->gpu(), call->stream()), nullptr);
  }
}

double sum_squares(py::handle grads, py::handle stream) {
  class Adder final : public LeafVisitor {
   public:
    explicit Adder(Call& call) : call_(call) {}
    void leaf(PyObject* const* nodes, const Path* path) override {
      const std::size_t index = count_++;
      if (nodes[0] != Py_None) call_.add_gradient(index, nodes[0], {grads_name, path});
    }

   private:
    Call& call_;
    std::size_t count_ = 0;
  };
  const py::object tree = as_tree(grads);
  const Call::Handle call = Call::make(stream);
  Adder adder(*call);
  Forest forest;
  forest.add(grads_name, tree.ptr());
  walk(forest, adder);
  call->check_memory(
      [&](std::size_t leaf, Role, int) { return spell_leaf(tree, grads_name, leaf); });
  if (call->device().is_cpu()) return call->sum_squares();
  return call->sum_squares(Workspace::of_functions(call->gpu(), call->stream()), true);
}

}  // namespace

void bind_functional(py::module_& module) {
  module.def("step", &step);
  module.def("step_coefficients", &step_coefficients);
  module.def("sum_squares", &sum_squares, py::arg("grads"), py::kw_only(),
             py::arg("stream") = py::none(),
             R"(Sum of the squares of all elements, accumulated in float64.

Args:
    grads: One array or a tree of arrays, any shapes and strides; float16, bfloat16, float32,
        float64 or longdouble. None leaves count as absent.

Returns:
    The sum over the fixed tree of the norm, the same bits for any thread count and instruction
    set. The square root of the sum, reduced over all processes, is what `grad_norm=` takes. It can
    overflow to inf only if float64 gradients exceed 1e154 in magnitude.

Raises:
    TypeError: If a leaf is no array of a floating-point dtype.

Example:
    >>> import numpy as np, fusedstep as fs
    >>> fs.sum_squares([np.array([3.0, 0.0], np.float32), np.array([[4.0]], np.float32)])
    25.0
)");
}

}  // namespace fusedstep::bindings
