#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <vector>

#include "bindings/call.hpp"
#include "bindings/tree.hpp"

namespace fusedstep::bindings {

/// The leaves of an optimizer: parameters, their state and step counts, bound to the user's trees.
/// Addresses are read anew in every step (`module.to()` swaps the memory of a live parameter).
class Plan {
 public:
  Plan(const py::sequence& trees, const py::sequence& names);

  std::size_t size() const { return leaves_.size(); }
  py::object leaf(std::size_t index) const { return at(index).param; }
  std::size_t tree(std::size_t index) const { return at(index).tree; }
  py::tuple path(std::size_t index) const { return at(index).path; }
  std::size_t get_row(std::size_t index) const { return at(index).row; }
  void set_row(std::size_t index, std::size_t row) { at(index).row = row; }
  py::tuple get_state(std::size_t index) const;
  void set_state(std::size_t index, const py::tuple& buffers);
  std::int64_t get_steps(std::size_t index) const { return at(index).steps; }
  void set_steps(std::size_t index, std::int64_t steps) { at(index).steps = steps; }

  py::object step(py::handle grads, const py::sequence& rows, py::handle on_nonfinite,
                  py::handle grad_norm, py::handle param_copy);
  void zero_grad(bool set_to_none);

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Entry {
    py::object param;
    py::tuple path;
    std::array<py::object, max_slots> states;
    std::int64_t steps = 0;  ///< applied so far
    std::size_t tree = 0;
    std::size_t row = 0;
  };
  class Filler;

  const Entry& at(std::size_t index) const;
  Entry& at(std::size_t index);
  void check_outputs() const;
  std::string spell(std::size_t leaf, Role role, int slot) const;
  void commit(const Call& call, const std::vector<std::size_t>& stepped);

  std::vector<py::object> trees_;
  std::vector<std::string> names_, grad_names_, copy_names_;
  std::vector<std::size_t> ends_;  ///< per tree: the index after its last leaf
  std::vector<Entry> leaves_;
};

void bind_plan(py::module_& module);

}  // namespace fusedstep::bindings
