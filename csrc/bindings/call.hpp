#pragma once
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "bindings/buffer.hpp"
#include "bindings/overlap.hpp"
#include "bindings/row.hpp"
#include "core/step.hpp"
#include "cpu/rule_info.hpp"

/// One step, from validated arguments to its execution. Everything that can fail happens before
/// the first byte is written.
namespace fusedstep::bindings {

/// What a plan knows of the arrays of a leaf from the step before, when they were the same objects.
/// Asking torch again takes longer than updating a small tensor.
struct Recollection {
  struct State {
    const void* plain_at = nullptr;
    Slot slot;  ///< where it was; data is null if that is not known
  };
  const void* plain_at = nullptr;  ///< of the parameter: see import_buffer
  std::vector<std::int64_t> form;  ///< of the parameter: element type, shape and strides
  State states[max_slots];
  /// Somebody has had the states in hands, and may have given them, or what shares their storage,
  /// other memory since. As long as nobody has, nobody computes with them either.
  bool shared = false;
};

/// One parameter and what goes with it; null where absent (a state: to be created).
struct Leaf {
  PyObject* param;
  PyObject* grad;
  PyObject* copy;
  PyObject* states[max_slots];
  std::vector<double>* chunk_sums = nullptr;  ///< see StepCall::Sums
  Recollection* known = nullptr;
  int known_state[max_slots] = {};  ///< of each state the index in Recollection::states
};

/// How messages call the arguments of a leaf.
struct LeafNames {
  const char* param;
  const char* grad;
  const char* copy;
  const Path* path;
};

/// Spells an argument of the n-th leaf; only called for errors.
using Speller = std::function<std::string(std::size_t leaf, Role role, int slot)>;

struct StepReport {
  std::optional<double> grad_norm;
  py::object tensor_norms = py::none();  ///< NumPy float64, one per leaf
  double clip_coef = 1.0;
  bool skipped = false;
};

/// A state buffer that had to be made.
struct CreatedState {
  std::size_t leaf;
  int rule, slot;
  py::object buffer;
};

class Call {
 public:
  /// Gives a call's memory to this thread's next one.
  struct Recycle {
    void operator()(Call* call) const;
  };
  using Handle = std::unique_ptr<Call, Recycle>;
  static Handle make();

  /// Adds a row and returns its index.
  std::uint32_t add_row(const RowSpec& spec, Progress progress);
  /// Notes what the rows of `spec` ask for, even if no leaf comes to use them.
  void announce(const RowSpec& spec) { measures_ = measures_ || spec.measures; }
  const Row& row(std::uint32_t index) const { return rows_[index]; }

  /// Imports and validates one leaf, the `index`-th of the step, that uses a row added before.
  /// Leaves of one row are in one group.
  void add_leaf(std::size_t index, const Leaf& leaf, const LeafNames& names, std::uint32_t row,
                std::size_t group = 0);

  /// Makes, where there is none yet or it does not fit any more, what gathers a parameter's
  /// gradients: zeros of its form and arithmetic type, by its own library. One that `waits` for a
  /// step is left alone. Returns how many chunks it has.
  static std::size_t make_sum(PyObject* param, bool waits, const Place& place, py::object& sum);

  /// The sums of squares of a gradient by chunks, as a step for this parameter would read it.
  std::vector<double> measure(const Leaf& leaf, const LeafNames& names);

  /// Only checks that an array can be updated.
  void add_output(std::size_t index, PyObject* object, const Place& place);
  /// Only checks that an array can be a state of a parameter.
  void add_state(PyObject* param, const Place& param_place, PyObject* state, const Place& place);
  /// Refuses memory that two arguments share, if one of them is written.
  void check_overlap(const Speller& spell);

  /// From now on a state may be a pair (int8 codes, float32 scales).
  void allow_block_states() { block_states_ = true; }

  /// State buffers that had to be made, in the order of the leaves.
  const std::vector<CreatedState>& created() const { return created_; }

  /// The last checks, then the step. `grad_norm` is the caller's own raw norm, or None; `leaves`
  /// how many there are, with those that were not added.
  StepReport run(const Policy& policy, py::handle grad_norm, std::size_t leaves,
                 const Speller& spell, StepCall::Sums sums = StepCall::Sums::none);

  /// After a step that was not skipped, and after its state and counts are where they belong: runs
  /// Python code, in which an interrupt may surface.
  void tell_producers();

  /// Instead of leaves: gradients alone, and the sum of their squares.
  void add_gradient(PyObject* object, const Place& place);
  double sum_squares();

 private:
  struct Written {
    const Producer* producer;
    std::vector<PyObject*> objects;  // kept by owners_
  };

  void clear();
  void keep(const Leaf& leaf);
  DType import_output(PyObject* object, const Place& place, Buffer& out,
                      const void** plain_at = nullptr);
  void import_gradient(PyObject* object, const Place& place, const Place& param_place,
                       const Buffer& param, Tensor& tensor, std::uint32_t leaf);
  void import_state(PyObject* object, const Place& place, const Place& param_place,
                    const Buffer& param, Tensor& tensor, int slot, std::uint32_t leaf,
                    Recollection::State* known = nullptr);
  bool recall_state(const Recollection& known, int index, const Buffer& param, Tensor& tensor,
                    int slot, std::uint32_t leaf);
  void import_block_state(PyObject* pair, const Place& place, const Buffer& param, Slot& slot,
                          std::uint32_t leaf, int index);
  void import_copy(PyObject* object, const Place& place, const Place& param_place,
                   const Buffer& param, Tensor& tensor, std::uint32_t leaf);
  static py::object create_state(PyObject* param, const Buffer& buffer, const Place& place);
  const GradLayout* layout_of(const Buffer& grad, const Buffer& order);
  void add_span(const Buffer& buffer, std::uint32_t leaf, Role role, int slot);
  void note_write(PyObject* object, const Producer& producer);

  void set_scopes(ClipScope scope);
  void give_each_tensor_a_row();
  std::optional<double> given_norm(py::handle grad_norm) const;
  [[noreturn]] void raise_nonfinite(const StepOutcome& outcome, const Speller& spell) const;
  void fill(StepReport& report) const;
  template <class Kernels>
  void run_kernels(Kernels kernels) const;

  Owners owners_;
  std::vector<Tensor> tensors_;
  std::vector<std::uint32_t> tensor_leaves_, tensor_groups_;
  std::vector<Row> rows_;
  std::vector<Span> spans_;
  std::vector<Written> written_;
  std::deque<std::vector<std::int64_t>> extents_;  // deques: tensors point into them
  std::deque<GradLayout> layouts_;
  std::vector<CreatedState> created_;
  std::vector<double> scope_scales_, norms_, tensor_norms_, clip_coefs_;
  std::int64_t elements_ = 0;
  bool measures_ = false;
  bool block_states_ = false;
};

}  // namespace fusedstep::bindings
