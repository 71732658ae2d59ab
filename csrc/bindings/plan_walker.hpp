#pragma once
#include <utility>
#include <vector>

#include "bindings/plan.hpp"

/// What the parts of Plan share.
namespace fusedstep::bindings {

template <class Call>
class LeafCall final : public LeafVisitor {
 public:
  explicit LeafCall(Call call) : call_(std::move(call)) {}
  void leaf(PyObject* const* nodes, const Path* path) override { call_(nodes, path); }

 private:
  Call call_;
};

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

}  // namespace fusedstep::bindings
