#include "bindings/plan.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

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

// ---- one call at a time -----------------------------------------------------------------------

/// Importing runs code of others, and kernels run without the GIL: a call that came in between
/// would find states and counts half-way.
class Plan::Busy {
 public:
  explicit Busy(Plan& plan) : busy_(plan.busy_) {
    plan.check_idle();
    busy_ = true;
  }
  ~Busy() { busy_ = false; }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  bool& busy_;
};

void Plan::check_idle() const {
  if (!busy_) return;
  throw std::runtime_error(
      "the optimizer is already in use by another call: by another thread, or by code that a call "
      "of it runs");
}

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

/// Spelt in errors only: a walk to the leaf, for every leaf, would be quadratic.
std::vector<Path> Plan::path_of(const Entry& entry) {
  std::vector<Path> path(entry.path.size());
  for (std::size_t k = 0; k < path.size(); ++k) {
    path[k] = {k > 0 ? &path[k - 1] : nullptr, py::object(entry.path[k]).ptr(), 0};
  }
  return path;
}

py::dict Plan::get_state(std::size_t index) {
  check_idle();
  Entry& entry = at(index);
  py::dict buffers;
  for (std::size_t k = 0; k < slots_.size(); ++k) {
    if (entry.states[k]) buffers[slots_[k].c_str()] = entry.states[k];
  }
  entry.known.shared = entry.known.shared || !buffers.empty();
  return buffers;
}

void Plan::set_state(std::size_t index, const py::dict& buffers) {
  const Busy busy(*this);
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
  entry.states = std::move(states);
  entry.known = {};
  entry.known.shared = true;
}

py::tuple Plan::get_progress(std::size_t index) const {
  check_idle();
  return py::make_tuple(at(index).steps, at(index).product);
}

void Plan::set_progress(std::size_t index, std::int64_t steps, double product) {
  check_idle();
  at(index).steps = steps;
  at(index).product = product;
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

// ---- one call over all leaves -----------------------------------------------------------------

/// Walks one tree after the other, sees that they are those of the registration, and adds the
/// leaves with a gradient to a call.
class Plan::Walker {
 public:
  explicit Walker(Plan& plan) : plan_(plan) {}
  virtual ~Walker() = default;

  /// With null `grads`, the gradients are those of `own_gradient`.
  void walk_tree(std::size_t tree, PyObject* grads, PyObject* copies) {
    tree_ = tree;
    asks_leaves_ = grads == nullptr;
    const std::size_t end = plan_.ends_[tree];
    LeafCall visitor([&](PyObject* const* nodes, const Path* path) {
      if (next_ == end || plan_.leaves_[next_].param.ptr() != nodes[0]) changed(nodes[0], path);
      visit(nodes, path);
      ++next_;
    });
    Forest forest;
    forest.add(plan_.names_[tree].c_str(), plan_.trees_[tree].ptr());
    forest.add(plan_.grad_names_[tree].c_str(), asks_leaves_ ? Py_None : grads);
    forest.add(plan_.copy_names_[tree].c_str(), copies);
    walk(forest, visitor);
    if (next_ != end) changed(nullptr, nullptr);
  }

  const std::vector<std::size_t>& added() const { return added_; }

 protected:
  /// Adds the leaf `index`, whose gradient and copy (or null) are given.
  virtual void add(std::size_t index, PyObject* grad, PyObject* copy, const LeafNames& names) = 0;

  /// The gradient that goes with a leaf, or None.
  virtual py::object own_gradient(std::size_t index, const Path* path) {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    PyObject* const param = plan_.leaves_[index].param.ptr();
    PyObject* grad = PyObject_GetAttr(param, name);
    if (grad == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
      PyErr_Clear();
      fail(PyExc_TypeError, {plan_.names_[tree_].c_str(), path},
           ": a " + type_name(Py_TYPE(param)) + " has no .grad; pass the gradients: step(grads)");
    }
    return py::reinterpret_steal<py::object>(grad);
  }

  Plan& plan_;

 private:
  void visit(PyObject* const* nodes, const Path* path) {
    py::object own, copy;
    PyObject* grad = nodes[1];
    if (asks_leaves_) {
      copy = py::reinterpret_borrow<py::object>(nodes[2]);  // an attribute may be anyone's code
      own = own_gradient(next_, path);
      grad = own.is_none() ? nullptr : own.ptr();
    }
    if (grad == nullptr) return;
    add(next_, grad, nodes[2],
        {plan_.names_[tree_].c_str(), plan_.grad_names_[tree_].c_str(),
         plan_.copy_names_[tree_].c_str(), path});
    added_.push_back(next_);
  }

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

  std::size_t next_ = 0, tree_ = 0;
  bool asks_leaves_ = false;
  std::vector<std::size_t> added_;
};

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

// ---- a step -----------------------------------------------------------------------------------

class Plan::StepFiller final : public Walker {
 public:
  StepFiller(Plan& plan, Call& call, const py::sequence& rows, bool accumulated, bool summed)
      : Walker(plan), call_(call), accumulated_(accumulated), summed_(summed) {
    for (const auto item : rows) {
      const auto pair = py::cast<py::tuple>(item);
      specs_.push_back(parse_row(py::cast<int>(pair[0]), pair[1]));
      call_.announce(specs_.back());
    }
  }

  /// The running product after the step, for each leaf that was added.
  std::vector<double> products() const {
    std::vector<double> of_rows, of_leaves;
    for (std::uint32_t k = 0; k < rows_.size(); ++k) {
      of_rows.push_back(cpu::product_after(call_.row(k)));
    }
    for (const std::uint32_t row : leaf_rows_) of_leaves.push_back(of_rows[row]);
    return of_leaves;
  }

 private:
  void add(std::size_t index, PyObject* grad, PyObject* copy, const LeafNames& names) override {
    Entry& entry = plan_.leaves_[index];
    Leaf leaf{entry.param.ptr(), grad, copy, {}};
    leaf.known = &entry.known;
    const int rule = specs_.at(entry.row).row.rule;
    const std::size_t slots = cpu::rule_infos()[static_cast<std::size_t>(rule)].slots.size();
    for (std::size_t k = 0; k < slots; ++k) {
      const int slot = plan_.slot_index(rule, static_cast<int>(k));
      leaf.known_state[k] = slot;
      leaf.states[k] = entry.states[static_cast<std::size_t>(slot)].ptr();
    }
    if (summed_) leaf.chunk_sums = &entry.sum_squares;
    // Not the same as the first step: SGD makes its buffer when momentum first applies.
    const bool first = slots > 0 && leaf.states[0] == nullptr;
    leaf_rows_.push_back(row(entry, first));
    call_.add_leaf(index, leaf, names, leaf_rows_.back(), entry.tree);
  }

  py::object own_gradient(std::size_t index, const Path* path) override {
    if (!accumulated_) return Walker::own_gradient(index, path);
    const Entry& entry = plan_.leaves_[index];
    return entry.accumulated ? entry.sum : py::none();
  }

  /// Tensors with the same hyper-parameters that have come equally far share a row.
  std::uint32_t row(const Entry& entry, bool first) {
    for (auto known = rows_.rbegin(); known != rows_.rend(); ++known) {
      const bool alike = known->spec == entry.row && known->first == first;
      if (alike && known->steps == entry.steps && known->product == entry.product) {
        return known->index;
      }
    }
    const Progress progress{entry.steps + 1, first, entry.product};
    const std::uint32_t index = call_.add_row(specs_.at(entry.row), progress);
    rows_.push_back({entry.row, entry.steps, entry.product, first, index});
    return index;
  }

  struct Known {
    std::size_t spec;
    std::int64_t steps;
    double product;
    bool first;
    std::uint32_t index;
  };

  Call& call_;
  const bool accumulated_;
  const bool summed_;  ///< the chunk sums of all gradients are known
  std::vector<RowSpec> specs_;
  std::vector<Known> rows_;
  std::vector<std::uint32_t> leaf_rows_;
};

py::object Plan::step(py::handle grads, const py::sequence& rows, py::handle policy,
                      py::handle grad_norm, py::handle param_copy, bool observed) {
  const Busy busy(*this);
  const bool accumulated = any_accumulated();
  if (accumulated && !grads.is_none()) {
    throw py::value_error(
        "grads: gradients were accumulated and wait for a step; call step() without any, or "
        "accumulate these too, or drop the others with zero_grad()");
  }
  const Call::Handle call = Call::make();
  const bool summed = accumulated || observed;
  StepFiller filler(*this, *call, rows, accumulated, summed);
  walk_trees(filler, grads, param_copy);
  const StepReport report = call->run(
      parse_policy(policy), grad_norm, leaves_.size(),
      [this](std::size_t leaf, Role role, int slot) { return spell(leaf, role, slot); },
      summed ? StepCall::Sums::of_gradients : StepCall::Sums::none);
  if (accumulated) drop_accumulated(false);
  if (!report.skipped) {
    commit(*call, filler);
    call->tell_producers();
  }
  return make_result(report, py::dict());
}

/// For a step that is told so: what arrives one by one, as autograd makes it, is measured while it
/// is in cache.
void Plan::observe(std::size_t index, py::handle grad) {
  const Busy busy(*this);
  Entry& entry = at(index);
  const std::vector<Path> path = path_of(entry);
  Leaf leaf{entry.param.ptr(), grad.ptr(), nullptr, {}};
  leaf.known = &entry.known;
  const Call::Handle call = Call::make();
  entry.sum_squares =
      call->measure(leaf, {names_[entry.tree].c_str(), grad_names_[entry.tree].c_str(), nullptr,
                           path.empty() ? nullptr : &path.back()});
}

void Plan::commit(const Call& call, const StepFiller& filler) {
  for (const CreatedState& created : call.created()) {
    const int slot = slot_index(created.rule, created.slot);
    leaves_[created.leaf].states[static_cast<std::size_t>(slot)] = created.buffer;
  }
  const std::vector<double> products = filler.products();
  for (std::size_t k = 0; k < products.size(); ++k) {
    Entry& entry = leaves_[filler.added()[k]];
    ++entry.steps;
    entry.product = products[k];
  }
}

// ---- accumulation -----------------------------------------------------------------------------

/// Adds gradients to the sums of their leaves.
class Plan::SumFiller final : public Walker {
 public:
  SumFiller(Plan& plan, Call& call, double scale) : Walker(plan), call_(call) {
    const auto& rules = cpu::rule_infos();
    const auto named = [](const cpu::RuleInfo& rule) {
      return rule.name == std::string("accumulate");
    };
    const auto rule = std::find_if(rules.begin(), rules.end(), named) - rules.begin();
    for (const double keep : {0.0, 1.0}) {
      RowSpec spec;
      spec.row.rule = static_cast<int>(rule);
      spec.row.rescale_grad = spec.row.sign = 1.0;
      spec.row.clip_norm = spec.row.clip_value = HUGE_VAL;
      spec.row.hyper[0] = keep;
      spec.row.hyper[1] = scale;
      call_.add_row(spec, {});
    }
  }

 private:
  void add(std::size_t index, PyObject* grad, PyObject* /*copy*/, const LeafNames& names) override {
    Entry& entry = plan_.leaves_[index];
    const auto held = py::reinterpret_borrow<py::object>(grad);
    const Place place{names.param, names.path};
    entry.sum_squares.resize(
        Call::make_sum(entry.param.ptr(), entry.accumulated, place, entry.sum));
    Leaf leaf{entry.sum.ptr(), grad, nullptr, {}};
    leaf.chunk_sums = &entry.sum_squares;
    call_.add_leaf(index, leaf, names, entry.accumulated ? 1 : 0);
  }

  Call& call_;
};

void Plan::accumulate(py::handle grads, double scale) {
  const Busy busy(*this);
  const Call::Handle call = Call::make();
  SumFiller filler(*this, *call, scale);
  walk_trees(filler, grads, py::none());
  call->run(
      Policy{}, py::none(), leaves_.size(),
      [this](std::size_t leaf, Role role, int slot) { return spell(leaf, role, slot); },
      StepCall::Sums::of_results);
  for (const std::size_t leaf : filler.added()) leaves_[leaf].accumulated = true;
  call->tell_producers();
}

bool Plan::has_accumulated() const {
  check_idle();
  return any_accumulated();
}

bool Plan::any_accumulated() const {
  return std::any_of(leaves_.begin(), leaves_.end(), [](const Entry& e) { return e.accumulated; });
}

void Plan::drop_accumulated(bool free_memory) {
  for (Entry& entry : leaves_) {
    entry.accumulated = false;
    if (free_memory) {
      entry.sum = py::object();
      entry.sum_squares.clear();
    }
  }
}

void Plan::zero_grad(bool set_to_none) {
  const Busy busy(*this);
  drop_accumulated(set_to_none);
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
      .def("step", &Plan::step, py::arg("grads"), py::arg("rows"), py::arg("policy"),
           py::arg("grad_norm"), py::arg("param_copy"), py::arg("observed") = false)
      .def("observe", &Plan::observe)
      .def("accumulate", &Plan::accumulate)
      .def("has_accumulated", &Plan::has_accumulated)
      .def("zero_grad", &Plan::zero_grad);
}

}  // namespace fusedstep::bindings
