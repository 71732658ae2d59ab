#include "bindings/tree.hpp"

#include "bindings/buffer.hpp"

namespace fusedstep::bindings {

namespace {

bool is_sequence(PyObject* node) { return PyList_Check(node) || PyTuple_Check(node); }

bool is_array(PyObject* node) { return producer_of(node).door != Producer::Door::none; }

/// The node as a dict, or a null object. Mappings that are no dicts (a frozen dict, say) are read
/// through a copy of their top level. Arrays are none, though NumPy's have the mapping protocol.
py::object dict_of(PyObject* node) {
  if (PyDict_Check(node)) return py::reinterpret_borrow<py::object>(node);
  if (is_sequence(node) || is_array(node)) return py::object();
  if (!PyMapping_Check(node) || !py::hasattr(node, "keys")) return py::object();
  return py::dict(py::handle(node).attr("items")());
}

class Walker {
 public:
  Walker(const Forest& forest, LeafVisitor& visitor) : forest_(forest), visitor_(visitor) {}

  void visit(PyObject* const* nodes, const Path* path) {
    if (Py_EnterRecursiveCall(" while walking a tree of arrays")) throw py::error_already_set();
    struct Leave {
      ~Leave() { Py_LeaveRecursiveCall(); }
    } leave;
    if (is_sequence(nodes[0])) return visit_sequence(nodes, path);
    if (PyDict_Check(nodes[0])) return visit_dict(nodes[0], nodes, path);
    if (is_array(nodes[0])) return visit_leaf(nodes, path);
    const Hold hold(nodes, forest_.size);
    if (const py::object dict = dict_of(nodes[0])) return visit_dict(dict.ptr(), nodes, path);
    visit_leaf(nodes, path);
  }

 private:
  void visit_leaf(PyObject* const* nodes, const Path* path) {
    for (int k = 1; k < forest_.size; ++k) {
      if (nodes[k] == nullptr || !is_sequence(nodes[k])) continue;
      if (!forest_.tuples_are_leaves) mismatch(k, nodes, path);
    }
    visitor_.leaf(nodes, path);
  }

  Place place(int tree, const Path* path) const { return {forest_.names[tree], path}; }

  [[noreturn]] void mismatch(int tree, PyObject* const* nodes, const Path* path) const {
    fail(PyExc_TypeError, place(tree, path),
         ": expected " + form_of(nodes[0]) + " like " + place(0, path).spell() + ", got " +
             form_of(nodes[tree]));
  }

  static std::string form_of(PyObject* node) {
    if (PyDict_Check(node)) return "a dict of " + std::to_string(PyDict_Size(node));
    if (is_sequence(node)) {
      return "a " + std::string(Py_TYPE(node)->tp_name) + " of " +
             std::to_string(PySequence_Size(node));
    }
    return is_array(node) ? "an array" : brief(node);
  }

  static PyObject* none_to_null(PyObject* node) { return node == Py_None ? nullptr : node; }

  /// Reading an exporter may run Python code that takes a container out of its parent.
  struct Hold {
    Hold(PyObject* const* nodes, int size) {
      for (int k = 0; k < size; ++k) held[k] = py::reinterpret_borrow<py::object>(nodes[k]);
    }
    py::object held[Forest::max_size];
  };

  void visit_sequence(PyObject* const* nodes, const Path* path) {
    const Hold hold(nodes, forest_.size);
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(nodes[0]);
    for (int k = 1; k < forest_.size; ++k) {
      if (nodes[k] == nullptr) continue;
      const bool alike = is_sequence(nodes[k]) && PySequence_Fast_GET_SIZE(nodes[k]) == size;
      if (!alike) mismatch(k, nodes, path);
    }
    PyObject* children[Forest::max_size];
    for (Py_ssize_t i = 0; i < size; ++i) {
      for (int k = 0; k < forest_.size; ++k) {
        // Or code that shortens a list.
        if (nodes[k] != nullptr && i >= PySequence_Fast_GET_SIZE(nodes[k])) changed(k, path);
        children[k] = nodes[k] != nullptr ? PySequence_Fast_GET_ITEM(nodes[k], i) : nullptr;
        if (k > 0 && children[k] != nullptr) children[k] = none_to_null(children[k]);
      }
      const Path child{path, nullptr, i};
      visit(children, &child);
    }
  }

  [[noreturn]] void changed(int tree, const Path* path) const {
    fail(PyExc_RuntimeError, place(tree, path), " changed while it was read");
  }

  void visit_dict(PyObject* first, PyObject* const* nodes, const Path* path) {
    const Hold hold(nodes, forest_.size);
    py::object dicts[Forest::max_size];
    for (int k = 1; k < forest_.size; ++k) {
      if (nodes[k] == nullptr) continue;
      dicts[k] = dict_of(nodes[k]);
      if (!dicts[k]) mismatch(k, nodes, path);
      if (PyDict_Size(dicts[k].ptr()) > PyDict_Size(first)) extra_key(k, first, dicts[k], path);
    }
    PyObject* children[Forest::max_size];
    const Py_ssize_t size = PyDict_Size(first);
    Py_ssize_t at = 0;
    PyObject* key;
    while (PyDict_Next(first, &at, &key, &children[0])) {
      for (int k = 1; k < forest_.size; ++k) {
        children[k] = nullptr;
        if (!dicts[k]) continue;
        children[k] = PyDict_GetItemWithError(dicts[k].ptr(), key);
        if (children[k] == nullptr) missing_key(k, key, path);
        children[k] = none_to_null(children[k]);
      }
      const py::object held = py::reinterpret_borrow<py::object>(key);
      const Path child{path, key, 0};
      visit(children, &child);
      if (PyDict_Size(first) != size) changed(0, path);
    }
  }

  [[noreturn]] void missing_key(int tree, PyObject* key, const Path* path) const {
    if (PyErr_Occurred()) throw py::error_already_set();
    fail(PyExc_ValueError, place(tree, path),
         ": missing key " + static_cast<std::string>(py::repr(key)) + ", which " +
             place(0, path).spell() + " has");
  }

  [[noreturn]] void extra_key(int tree, PyObject* first, const py::object& dict,
                              const Path* path) const {
    for (const auto item : py::reinterpret_borrow<py::dict>(dict)) {
      if (PyDict_Contains(first, item.first.ptr()) == 1) continue;
      fail(PyExc_ValueError, place(tree, path),
           ": extra key " + static_cast<std::string>(py::repr(item.first)) + ", which " +
               place(0, path).spell() + " does not have");
    }
    throw InternalError("a dict with more keys has no extra key");
  }

  const Forest& forest_;
  LeafVisitor& visitor_;
};

/// A visitor from a callable, for the small walks below.
template <class Call>
class CallVisitor final : public LeafVisitor {
 public:
  explicit CallVisitor(Call call) : call_(std::move(call)) {}
  void leaf(PyObject* const* nodes, const Path* path) override { call_(nodes[0], path); }

 private:
  Call call_;
};

template <class Call>
void for_each_leaf(py::handle tree, const char* name, Call call) {
  Forest forest;
  forest.add(name, tree.ptr());
  CallVisitor<Call> visitor(std::move(call));
  walk(forest, visitor);
}

bool is_named_pairs(PyObject* sequence) {
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(sequence);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* pair = PySequence_Fast_GET_ITEM(sequence, i);
    const bool named = PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2 &&
                       PyUnicode_Check(PyTuple_GET_ITEM(pair, 0));
    if (!named) return false;
  }
  return size > 0;
}

/// Of two arrays with one name a dict would keep the last without a word.
py::dict dict_of_pairs(const py::object& pairs) {
  py::dict dict;
  for (const auto item : pairs) {
    const auto pair = py::reinterpret_borrow<py::tuple>(item);
    if (dict.contains(pair[0])) {
      throw py::value_error("the name " + static_cast<std::string>(py::repr(pair[0])) +
                            " occurs twice among the (name, array) pairs; pass a dict, or param "
                            "groups");
    }
    dict[pair[0]] = pair[1];
  }
  return dict;
}

py::object rebuild_from(PyObject* node, const std::vector<PyObject*>& leaves, std::size_t& next) {
  if (is_sequence(node)) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(node);
    py::list list(size);
    for (Py_ssize_t i = 0; i < size; ++i) {
      list[static_cast<std::size_t>(i)] =
          rebuild_from(PySequence_Fast_GET_ITEM(node, i), leaves, next);
    }
    return PyTuple_Check(node) ? py::object(py::tuple(list)) : py::object(list);
  }
  if (const py::object dict = dict_of(node)) {
    py::dict out;
    for (const auto item : py::reinterpret_borrow<py::dict>(dict)) {
      out[item.first] = rebuild_from(item.second.ptr(), leaves, next);
    }
    return std::move(out);
  }
  PyObject* leaf = leaves.at(next++);
  return py::reinterpret_borrow<py::object>(leaf != nullptr ? leaf : Py_None);
}

}  // namespace

void walk(const Forest& forest, LeafVisitor& visitor) {
  PyObject* nodes[Forest::max_size];
  for (int k = 0; k < forest.size; ++k) {
    const bool absent = k > 0 && forest.roots[k] == Py_None;
    nodes[k] = absent ? nullptr : forest.roots[k];
  }
  Walker(forest, visitor).visit(nodes, nullptr);
}

py::object as_tree(py::handle object) {
  PyObject* node = object.ptr();
  py::object tree = py::reinterpret_borrow<py::object>(object);
  if (!is_sequence(node)) {
    const bool iterable = Py_TYPE(node)->tp_iter != nullptr && !PyUnicode_Check(node) &&
                          !PyDict_Check(node) && !is_array(node) && !py::hasattr(node, "keys");
    if (!iterable) return tree;
    tree = py::list(tree);
  }
  return is_named_pairs(tree.ptr()) ? dict_of_pairs(tree) : tree;
}

py::object rebuild(py::handle tree, const std::vector<PyObject*>& leaves) {
  std::size_t next = 0;
  return rebuild_from(tree.ptr(), leaves, next);
}

std::string spell_leaf(py::handle tree, const char* name, std::size_t leaf) {
  std::size_t at = 0;
  std::string text = name;
  for_each_leaf(tree, name, [&](PyObject*, const Path* path) {
    if (at++ == leaf) text = Place{name, path}.spell();
  });
  return text;
}

py::list flatten(py::handle tree, const std::string& name) {
  py::list out;
  for_each_leaf(tree, name.c_str(), [&](PyObject* leaf, const Path* path) {
    out.append(py::make_tuple(path_tuple(path), py::handle(leaf)));
  });
  return out;
}

py::tuple path_tuple(const Path* path) {
  py::list keys;
  for (; path != nullptr; path = path->parent) {
    keys.insert(0, path->key != nullptr ? py::reinterpret_borrow<py::object>(path->key)
                                        : py::int_(path->index));
  }
  return py::tuple(keys);
}

}  // namespace fusedstep::bindings
