#include "bindings/plan.hpp"

#include "bindings/result.hpp"

namespace fusedstep::bindings {

namespace {

/// "grads" for the tree "params", "grads[1]" for the second of several.
std::string sibling(const char* name, std::size_t tree, std::size_t trees) {
  return trees == 1 ? name : name + ("[" + std::to_string(tree) + "]");
}

template <class Call>
class LeafCall final : public LeafVisitor {
 public:
  explicit LeafCall(Call call) : call_(std::move(call)) {}
  void leaf(PyObject* const* nodes, const Path* path) override { call_(nodes, path); }

 private:
  Call call_;
};

}  // namespace

Plan::Plan(const py::sequence& trees, const py::sequence& names) {
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
  call->check_overlap(
      [this](std::size_t leaf, Role role, int slot) { return spell(leaf, role, slot); });
}

const Plan::Entry& Plan::at(std::size_t index) const {
  if (index >= leaves_.size()) throw py::index_error("no such leaf");
  return leaves_[index];
}

Plan::Entry& Plan::at(std::size_t index) {
  return const_cast<Entry&>(static_cast<const Plan*>(this)->at(index));
}

py::tuple Plan::get_state(std::size_t index) const {
  py::list buffers;
  for (const py::object& state : at(index).states) {
    if (state) buffers.append(state);
  }
  return py::tuple(buffers);
}

void Plan::set_state(std::size_t index, const py::tuple& buffers) {
  Entry& entry = at(index);
  if (buffers.size() > max_slots) throw InternalError("too many state buffers");
  // Spelt in errors only: a walk to the leaf, for every leaf, would be quadratic.
  std::vector<Path> path(entry.path.size());
  for (std::size_t k = 0; k < path.size(); ++k) {
    path[k] = {k > 0 ? &path[k - 1] : nullptr, py::object(entry.path[k]).ptr(), 0};
  }
  const Path* const leaf = path.empty() ? nullptr : &path.back();
  const std::string& param = names_[entry.tree];
  const std::string state = "the state of " + param;
  const Call::Handle call = Call::make();
  for (const auto buffer : buffers) {
    call->add_state(entry.param.ptr(), {param.c_str(), leaf}, buffer.ptr(), {state.c_str(), leaf});
  }
  for (std::size_t k = 0; k < max_slots; ++k) {
    entry.states[k] = k < buffers.size() ? py::object(buffers[k]) : py::object();
  }
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

/// Walks one tree after the other and fills a call.
class Plan::Filler {
 public:
  Filler(Plan& plan, Call& call, const py::sequence& rows) : plan_(plan), call_(call) {
    for (const auto item : rows) {
      const auto pair = py::cast<py::tuple>(item);
      specs_.push_back(parse_row(py::cast<int>(pair[0]), pair[1]));
    }
  }

  void fill(std::size_t tree, PyObject* grads, PyObject* copies) {
    tree_ = tree;
    read_grad_ = grads == nullptr;
    const std::size_t end = plan_.ends_[tree];
    LeafCall visitor([&](PyObject* const* nodes, const Path* path) {
      if (next_ == end || plan_.leaves_[next_].param.ptr() != nodes[0]) changed(nodes[0], path);
      add(nodes, path);
      ++next_;
    });
    Forest forest;
    forest.add(plan_.names_[tree].c_str(), plan_.trees_[tree].ptr());
    forest.add(plan_.grad_names_[tree].c_str(), read_grad_ ? Py_None : grads);
    forest.add(plan_.copy_names_[tree].c_str(), copies);
    walk(forest, visitor);
    if (next_ != end) changed(nullptr, nullptr);
  }

  const std::vector<std::size_t>& stepped() const { return stepped_; }

 private:
  [[noreturn]] void changed(PyObject* found, const Path* path) const {
    const Place place{plan_.names_[tree_].c_str(), path};
    if (found == nullptr || next_ >= plan_.leaves_.size()) {
      fail(PyExc_ValueError, place,
           " has other leaves than at registration; register the new tree");
    }
    fail(PyExc_ValueError, place,
         " is another array than the one registered, which would be updated unseen; assign in "
         "place (" +
             place.spell() + "[...] = new) or register again");
  }

  void add(PyObject* const* nodes, const Path* path) {
    py::object read;
    PyObject* grad = nodes[1];
    if (read_grad_) {
      read = grad_of(nodes[0], path);
      grad = read.is_none() ? nullptr : read.ptr();
    }
    if (grad == nullptr) return;
    const Entry& entry = plan_.leaves_[next_];
    Leaf leaf{nodes[0], grad, nodes[2], {}};
    for (std::size_t k = 0; k < max_slots; ++k) leaf.states[k] = entry.states[k].ptr();
    call_.add_leaf(next_, leaf,
                   {plan_.names_[tree_].c_str(), plan_.grad_names_[tree_].c_str(),
                    plan_.copy_names_[tree_].c_str(), path},
                   row(entry));
    stepped_.push_back(next_);
  }

  py::object grad_of(PyObject* param, const Path* path) const {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    PyObject* grad = PyObject_GetAttr(param, name);
    if (grad == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
      PyErr_Clear();
      fail(PyExc_TypeError, {plan_.names_[tree_].c_str(), path},
           ": a " + type_name(Py_TYPE(param)) + " has no .grad; pass the gradients: step(grads)");
    }
    return py::reinterpret_steal<py::object>(grad);
  }

  /// Tensors with the same hyper-parameters that have come equally far share a row.
  std::uint32_t row(const Entry& entry) {
    // Not the same as the first step: SGD makes its buffer when momentum first applies.
    const bool first = !entry.states[0];
    for (auto known = rows_.rbegin(); known != rows_.rend(); ++known) {
      const bool alike = known->spec == entry.row && known->steps == entry.steps;
      if (alike && known->first == first) return known->index;
    }
    const Progress progress{entry.steps + 1, first};
    const std::uint32_t index = call_.add_row(specs_.at(entry.row), progress);
    rows_.push_back({entry.row, entry.steps, first, index});
    return index;
  }

  struct Known {
    std::size_t spec;
    std::int64_t steps;
    bool first;
    std::uint32_t index;
  };

  Plan& plan_;
  Call& call_;
  std::vector<RowSpec> specs_;
  std::vector<Known> rows_;
  std::vector<std::size_t> stepped_;
  std::size_t next_ = 0, tree_ = 0;
  bool read_grad_ = false;
};

py::object Plan::step(py::handle grads, const py::sequence& rows, py::handle on_nonfinite,
                      py::handle grad_norm, py::handle param_copy) {
  const Call::Handle call = Call::make();
  Filler filler(*this, *call, rows);
  py::list kept;  // trees made from iterators live until the call is over
  for (std::size_t k = 0; k < trees_.size(); ++k) {
    const auto pick = [&](py::handle all) -> PyObject* {
      if (all.is_none()) return nullptr;
      kept.append(as_tree(py::reinterpret_borrow<py::sequence>(all)[k]));
      return kept[kept.size() - 1].ptr();
    };
    PyObject* const copies = pick(param_copy);
    filler.fill(k, pick(grads), copies != nullptr ? copies : Py_None);
  }
  const StepReport report =
      call->run(parse_on_nonfinite(on_nonfinite), grad_norm,
                [this](std::size_t leaf, Role role, int slot) { return spell(leaf, role, slot); });
  if (!report.skipped) {
    commit(*call, filler.stepped());
    call->tell_producers();
  }
  return make_result(report, py::dict());
}

void Plan::commit(const Call& call, const std::vector<std::size_t>& stepped) {
  for (const CreatedState& created : call.created()) {
    leaves_[created.leaf].states[static_cast<std::size_t>(created.slot)] = created.buffer;
  }
  for (const std::size_t leaf : stepped) ++leaves_[leaf].steps;
}

void Plan::zero_grad(bool set_to_none) {
  for (const Entry& entry : leaves_) {
    const py::object grad = py::getattr(entry.param, "grad", py::none());
    if (grad.is_none()) continue;
    if (set_to_none) {
      entry.param.attr("grad") = py::none();
    } else {
      if (py::hasattr(grad, "detach_")) grad.attr("detach_")();
      grad[py::ellipsis()] = 0;
    }
  }
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const py::object& tree : trees_) Py_VISIT(tree.ptr());
  for (const Entry& entry : leaves_) {
    Py_VISIT(entry.param.ptr());
    for (const py::object& state : entry.states) Py_VISIT(state.ptr());
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
      .def(py::init<const py::sequence&, const py::sequence&>())
      .def("__len__", &Plan::size)
      .def("leaf", &Plan::leaf)
      .def("tree", &Plan::tree)
      .def("path", &Plan::path)
      .def("get_row", &Plan::get_row)
      .def("set_row", &Plan::set_row)
      .def("get_state", &Plan::get_state)
      .def("set_state", &Plan::set_state)
      .def("get_steps", &Plan::get_steps)
      .def("set_steps", &Plan::set_steps)
      .def("step", &Plan::step)
      .def("zero_grad", &Plan::zero_grad);
}

}  // namespace fusedstep::bindings
