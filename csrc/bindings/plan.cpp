#include "bindings/plan.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

#include "bindings/plan_walker.hpp"

namespace fusedstep::bindings {

namespace {

/// "grads" for the tree "params", "grads[1]" for the second of several.
std::string sibling(const char* name, std::size_t tree, std::size_t trees) {
  return trees == 1 ? name : name + ("[" + std::to_string(tree) + "]");
}

}  // namespace

// ---- registration ---------------------------------------------------------------------------

Plan::Plan(const py::sequence& trees, const py::sequence& names, std::vector<std::string> slots)
    : slots_(std::move(slots)) {
  if (slots_.size() > max_slots) throw InternalError("too many state buffers");
  for (const cpu::RuleInfo& rule : cpu::rule_infos()) {
    slot_indices_.emplace_back();
    for (std::size_t k = 0; k < rule.slots.size(); ++k) {
      const auto found = std::find(slots_.begin(), slots_.end(), rule.slots[k]);
      slot_indices_.back()[k] = static_cast<int>(found - slots_.begin());
    }
  }
  for (std::size_t k = 0; k < trees.size(); ++k) {
    trees_.push_back(as_tree(trees[k]));
    names_.push_back(py::cast<std::string>(names[k]));
    grad_names_.push_back(sibling("grads", k, trees.size()));
    copy_names_.push_back(sibling("param_copy", k, trees.size()));
    const std::size_t before = leaves_.size();
    LeafCall visitor([&](PyObject* const* nodes, const Path* path) {
      Entry entry;
      entry.param = py::reinterpret_borrow<py::object>(nodes[0]);
      entry.path = path_tuple(path);
      entry.tree = entry.row = k;
      leaves_.push_back(std::move(entry));
    });
    Forest forest;
    forest.add(names_[k].c_str(), trees_[k].ptr());
    walk(forest, visitor);
    if (leaves_.size() == before) {
      throw py::value_error(names_[k] + " is empty (an exhausted generator?)");
    }
    ends_.push_back(leaves_.size());
  }
  check_outputs();
}

/// What cannot be updated is refused at registration, not at the first step.
void Plan::check_outputs() const {
  const Call::Handle call = Call::make();
  std::size_t index = 0;
  for (std::size_t k = 0; k < trees_.size(); ++k) {
    LeafCall visitor([&](PyObject* const* nodes, const Path* path) {
      call->add_output(index++, nodes[0], {names_[k].c_str(), path});
    });
    Forest forest;
    forest.add(names_[k].c_str(), trees_[k].ptr());
    walk(forest, visitor);
  }
  call->check_memory(speller());
}

const Plan::Entry& Plan::at(std::size_t index) const {
  if (index >= leaves_.size()) throw py::index_error("no such leaf");
  return leaves_[index];
}

Plan::Entry& Plan::at(std::size_t index) {
  return const_cast<Entry&>(static_cast<const Plan*>(this)->at(index));
}

/// Spelt in errors only: a walk to the leaf, for every leaf, would be quadratic.
std::vector<Path> Plan::path_of(const Entry& entry) {
  std::vector<Path> path(entry.path.size());
  for (std::size_t k = 0; k < path.size(); ++k) {
    path[k] = {k > 0 ? &path[k - 1] : nullptr, py::object(entry.path[k]).ptr(), 0};
  }
  return path;
}

py::dict Plan::get_state(std::size_t index) {
  const Reading reading(turn_);
  Entry& entry = at(index);
  settle();
  wait_for_last_step();
  const bool fresh = entry.cell != CellTable::none && device_->cells.info(entry.cell).fresh;
  py::dict buffers;
  for (std::size_t k = 0; k < slots_.size(); ++k) {
    if (fresh && entry.fresh[k]) continue;  // made for a step that was skipped
    if (entry.states[k]) buffers[slots_[k].c_str()] = entry.states[k];
  }
  entry.known.shared = entry.known.shared || !buffers.empty();
  return buffers;
}

void Plan::set_state(std::size_t index, const py::dict& buffers) {
  const Busy busy(turn_);
  Entry& entry = at(index);
  const std::vector<Path> path = path_of(entry);
  const Path* const leaf = path.empty() ? nullptr : &path.back();
  const std::string& param = names_[entry.tree];
  std::array<py::object, max_slots> states;
  const Call::Handle call = Call::make();
  for (const auto& [name, buffer] : buffers) {
    const auto slot = std::find(slots_.begin(), slots_.end(), py::cast<std::string>(name));
    if (slot == slots_.end()) throw InternalError("unknown state buffer");
    const std::string what = *slot + " of " + param;
    call->add_state(entry.param.ptr(), {param.c_str(), leaf}, buffer.ptr(), {what.c_str(), leaf});
    states[static_cast<std::size_t>(slot - slots_.begin())] =
        py::reinterpret_borrow<py::object>(buffer);
  }
  settle();
  detach(entry);
  entry.states = std::move(states);
  entry.known = {};
  entry.known.shared = true;
}

py::tuple Plan::get_progress(std::size_t index) {
  const Reading reading(turn_);
  const Entry& entry = at(index);
  if (entry.cell == CellTable::none) return py::make_tuple(entry.steps, entry.product);
  settle();
  const CellInfo& known = device_->cells.info(entry.cell);
  return py::make_tuple(known.steps, known.product);
}

void Plan::set_progress(std::size_t index, std::int64_t steps, double product) {
  const Busy busy(turn_);
  Entry& entry = at(index);
  settle();
  detach(entry);
  entry.steps = steps;
  entry.product = product;
}

Speller Plan::speller() const {
  return [this](std::size_t leaf, Role role, int slot) { return spell(leaf, role, slot); };
}

int Plan::slot_index(int rule, int slot) const {
  const int index = slot_indices_[static_cast<std::size_t>(rule)][static_cast<std::size_t>(slot)];
  if (index == static_cast<int>(slots_.size())) throw InternalError("a rule keeps other state");
  return index;
}

std::string Plan::spell(std::size_t leaf, Role role, int /*slot*/) const {
  const std::size_t tree = at(leaf).tree;
  const std::size_t first = tree == 0 ? 0 : ends_[tree - 1];
  const std::string& name = role == Role::grad   ? grad_names_[tree]
                            : role == Role::copy ? copy_names_[tree]
                                                 : names_[tree];
  const std::string text = spell_leaf(trees_[tree], name.c_str(), leaf - first);
  return role == Role::state ? "the state of " + text : text;
}

void Plan::walk_trees(Walker& walker, py::handle grads, py::handle param_copy) {
  py::list kept;  // trees made from iterators live until the walk is over
  for (std::size_t k = 0; k < trees_.size(); ++k) {
    const auto pick = [&](py::handle all) -> PyObject* {
      if (all.is_none()) return nullptr;
      kept.append(as_tree(py::reinterpret_borrow<py::sequence>(all)[k]));
      return kept[kept.size() - 1].ptr();
    };
    PyObject* const copies = pick(param_copy);
    walker.walk_tree(k, pick(grads), copies != nullptr ? copies : Py_None);
  }
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const py::object& tree : trees_) Py_VISIT(tree.ptr());
  for (const Entry& entry : leaves_) {
    Py_VISIT(entry.param.ptr());
    for (const py::object& state : entry.states) Py_VISIT(state.ptr());
    Py_VISIT(entry.sum.ptr());
  }
  return 0;
}

void Plan::clear() {
  std::vector<Entry> leaves;
  std::vector<py::object> trees;
  leaves.swap(leaves_);  // destructors run on objects that nobody can reach any more
  trees.swap(trees_);
}

namespace {

int plan_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!py::detail::is_holder_constructed(self)) return 0;
  return py::cast<const Plan&>(py::handle(self)).traverse(visit, arg);
}

int plan_clear(PyObject* self) {
  py::cast<Plan&>(py::handle(self)).clear();
  return 0;
}

}  // namespace

void bind_plan(py::module_& module) {
  const py::custom_type_setup collectable([](PyHeapTypeObject* type) {
    type->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->ht_type.tp_traverse = plan_traverse;
    type->ht_type.tp_clear = plan_clear;
  });
  py::class_<Plan>(module, "Plan", collectable)
      .def(py::init<const py::sequence&, const py::sequence&, std::vector<std::string>>())
      .def("__len__", &Plan::size)
      .def("leaf", &Plan::leaf)
      .def("tree", &Plan::tree)
      .def("path", &Plan::path)
      .def("get_row", &Plan::get_row)
      .def("set_row", &Plan::set_row)
      .def("get_state", &Plan::get_state)
      .def("set_state", &Plan::set_state)
      .def("get_progress", &Plan::get_progress)
      .def("set_progress", &Plan::set_progress)
      .def(
          "step",
          [](Plan& self, py::handle grads, const py::sequence& rows, py::handle policy,
             py::handle grad_norm, py::handle param_copy, bool observed, py::handle found_inf,
             py::handle grad_scale, py::handle stream) {
            return self.step(
                grads, rows,
                {policy, grad_norm, param_copy, found_inf, grad_scale, stream, observed});
          },
          py::arg("grads"), py::arg("rows"), py::arg("policy"), py::arg("grad_norm"),
          py::arg("param_copy"), py::arg("observed") = false, py::arg("found_inf") = py::none(),
          py::arg("grad_scale") = py::none(), py::arg("stream") = py::none())
      .def("take_counts", &Plan::take_counts)
      .def_property_readonly("unsure", &Plan::is_unsure)
      .def("observe", &Plan::observe, py::arg("index"), py::arg("grad"),
           py::arg("stream") = py::none())
      .def("accumulate", &Plan::accumulate, py::arg("grads"), py::arg("scale"),
           py::arg("stream") = py::none())
      .def("has_accumulated", &Plan::has_accumulated)
      .def("zero_grad", &Plan::zero_grad);
}

}  // namespace fusedstep::bindings
