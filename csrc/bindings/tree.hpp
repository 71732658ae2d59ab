#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings/errors.hpp"
#include "core/types.hpp"

/// Trees of arrays: nested dicts, lists and tuples. Several trees of the same form are walked
/// together; dicts match by key, never by order.
namespace fusedstep::bindings {

/// Trees that belong together; the first one gives the form. In all others None, for a leaf or for
/// a whole subtree, means absent.
struct Forest {
  static constexpr int max_size = 3 + max_slots;  ///< params, grads, param_copy, state
  int size = 0;
  bool tuples_are_leaves = false;  ///< where the first tree has a leaf
  const char* names[max_size];
  PyObject* roots[max_size];
  void add(const char* name, PyObject* root) {
    names[size] = name;
    roots[size++] = root;
  }
};

class LeafVisitor {
 public:
  virtual ~LeafVisitor() = default;
  /// `nodes[k]` is the leaf in tree k (borrowed; null if absent), `path` where it is.
  virtual void leaf(PyObject* const* nodes, const Path* path) = 0;
};

/// Visits all leaves in the order of the first tree. Raises TypeError or ValueError, naming
/// argument and path, where a tree has another form.
void walk(const Forest& forest, LeafVisitor& visitor);

/// What a caller may pass instead of a tree, as a tree: an iterator or other iterable becomes a
/// list, (name, array) pairs (model.named_parameters()) a dict. Anything else is returned as it is.
py::object as_tree(py::handle object);

/// A tree of the same form with `leaves` (null: None) in call order.
py::object rebuild(py::handle tree, const std::vector<PyObject*>& leaves);

/// The place of a leaf, counted in call order, in a tree that is called `name`.
std::string spell_leaf(py::handle tree, const char* name, std::size_t leaf);

/// [(path, leaf), ...] in call order.
py::list flatten(py::handle tree, const std::string& name);

/// Path as a tuple of keys.
py::tuple path_tuple(const Path* path);

}  // namespace fusedstep::bindings
