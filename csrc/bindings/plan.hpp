#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "bindings/call.hpp"
#include "bindings/cells.hpp"
#include "bindings/tree.hpp"
#include "bindings/turn.hpp"

namespace fusedstep::bindings {

/// The leaves of an optimizer: parameters, their state and step counts, bound to the user's trees.
/// Addresses are read anew in every step (`module.to()` swaps the memory of a live parameter).
class Plan {
 public:
  /// `slots` names all state buffers that the optimizer's rules may have.
  Plan(const py::sequence& trees, const py::sequence& names, std::vector<std::string> slots);

  std::size_t size() const { return leaves_.size(); }
  py::object leaf(std::size_t index) const { return at(index).param; }
  std::size_t tree(std::size_t index) const { return at(index).tree; }
  py::tuple path(std::size_t index) const { return at(index).path; }
  std::size_t get_row(std::size_t index) const { return at(index).row; }
  void set_row(std::size_t index, std::size_t row) {
    check_idle();
    at(index).row = row;
  }
  py::dict get_state(std::size_t index);
  void set_state(std::size_t index, const py::dict& buffers);
  py::tuple get_progress(std::size_t index);
  void set_progress(std::size_t index, std::int64_t steps, double product);

  /// The arguments of a step that are not its gradients and rows.
  struct StepOptions {
    py::handle policy, grad_norm, param_copy, found_inf, grad_scale, stream;
    bool observed;
  };
  py::object step(py::handle grads, const py::sequence& rows, const StepOptions& options);
  /// Steps applied and skipped since the last time, on a device; waits only if it knows more.
  py::tuple take_counts();
  /// Whether it does.
  bool is_unsure() const { return device_ && device_->counts.is_unsure(); }
  void observe(std::size_t index, py::handle grad, py::handle stream);
  void accumulate(py::handle grads, double scale, py::handle stream);
  bool has_accumulated();
  void drop_accumulated(bool free_memory);
  void zero_grad(bool set_to_none);

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Entry {
    py::object param;
    py::tuple path;
    std::array<py::object, max_slots> states;  ///< by the order of slots_
    Recollection known;                        ///< its states by the order of slots_
    std::int64_t steps = 0;                    ///< applied so far
    double product = 1.0;                      ///< see Progress
    int cell = CellTable::none;                ///< if it has one, that knows these two better
    std::array<bool, max_slots> fresh{};       ///< a state that is none if the cell is fresh
    py::object sum;                            ///< gathers gradients, or null
    ChunkSums sum_squares;                     ///< of `sum` or of an observed gradient
    bool accumulated = false;                  ///< `sum` waits for a step
    std::size_t tree = 0;
    std::size_t row = 0;
  };
  /// Importing runs code of others, and kernels run without the GIL: a call that came in between
  /// would find states and counts half-way. One that only looks may have to wait for a device.
  using Busy = Taken<Turn::Kind::change>;
  using Reading = Taken<Turn::Kind::look>;
  class Walker;
  class StepFiller;
  class SumFiller;
  class NewCells;

  void check_idle() { turn_.check_idle(); }
  bool any_accumulated() const;
  const Entry& at(std::size_t index) const;
  Entry& at(std::size_t index);
  void check_outputs() const;
  std::string spell(std::size_t leaf, Role role, int slot) const;
  static std::vector<Path> path_of(const Entry& entry);
  void walk_trees(Walker& walker, py::handle grads, py::handle param_copy);
  int slot_index(int rule, int slot) const;
  Speller speller() const;
  void commit(const Call& call, const StepFiller& filler);

  void follow_device(const Entry& entry);
  void check_device(const Call& call) const;
  void leave_device();
  DeviceSide& device_side(const Call& call);
  Arena* arena_of(const Call& call);
  void note_capture(const std::vector<std::size_t>& leaves);
  Stream library_stream() const;
  Stream reading_stream() const;
  void wait_for_last_step();
  void settle();
  void detach(Entry& entry);
  void take_device_counts();
  py::object step_on_device(Call& call, const StepFiller& filler, const Policy& policy,
                            StepCall::Sums sums);
  void move_to(NewCells& cells, const StepFiller& filler, bool device_decides, bool captured);
  void keep_created(const Call& call, bool may_be_skipped);

  std::vector<py::object> trees_;
  std::vector<std::string> names_, grad_names_, copy_names_, slots_;
  std::vector<std::array<int, max_slots>> slot_indices_;  ///< [rule][slot of the rule]
  std::vector<std::size_t> ends_;  ///< per tree: the index after its last leaf
  std::vector<Entry> leaves_;
  std::unique_ptr<DeviceSide> device_;  ///< none until a step on a device
  Counts counts_{};                     ///< not taken yet, of devices that were left
  Turn turn_;                           ///< of the call that is under way
};

void bind_plan(py::module_& module);

}  // namespace fusedstep::bindings
