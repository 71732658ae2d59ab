#pragma once
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "bindings/backend.hpp"
#include "bindings/buffer.hpp"
#include "bindings/number.hpp"
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
  std::vector<std::int64_t> form;  ///< of the parameter: type, device, shape and strides
  State states[max_slots];
  /// Somebody has had the states in hands, and may have given them, or what shares their storage,
  /// other memory since. As long as nobody has, nobody computes with them either.
  bool shared = false;
};

/// Sums of squares over the chunks of an array, kept where the array is.
class ChunkSums {
 public:
  ChunkSums() = default;
  ChunkSums(ChunkSums&&) = default;
  ChunkSums& operator=(ChunkSums&&) = default;

  std::size_t size() const { return size_; }
  double* data() const { return data_; }
  /// Makes room for so many; `arena` is that of the device, null for the CPU.
  void resize(std::size_t size, Arena* arena);
  /// None of them; room on a device is kept for others.
  void clear();

 private:
  std::vector<double> host_;
  Arena* arena_ = nullptr;  ///< where `data_` is from
  std::size_t size_ = 0, room_ = 0;
  double* data_ = nullptr;
};

/// One parameter and what goes with it; null where absent (a state: to be created).
struct Leaf {
  PyObject* param;
  PyObject* grad;
  PyObject* copy;
  PyObject* states[max_slots];
  const ChunkSums* chunk_sums = nullptr;  ///< see StepCall::Sums
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

/// What concerns a step as a whole; None where absent.
struct StepArguments {
  Policy policy;
  py::handle grad_norm = Py_None;   ///< the caller's own raw norm
  py::handle found_inf = Py_None;   ///< not 0: the step is skipped
  py::handle grad_scale = Py_None;  ///< all gradients are divided by it
};

struct StepReport {
  std::optional<double> grad_norm;
  py::object tensor_norms = py::none();  ///< NumPy float64, one per leaf
  double clip_coef = 1.0;
  bool skipped = false;
};

/// A step that was put into the stream of a device, and what is known of it before it has run.
struct Launched {
  std::unique_ptr<Report> report;  ///< none: it is skipped, and was not put there
  Stream stream;
  bool captured = false;  ///< it will run whenever, and wherever, its graph is replayed
  py::object array;       ///< of the library that does so
  bool has_norm = false, has_tensor_norms = false, may_skip = false, may_clip = false;
  std::size_t leaves = 0;
  std::vector<std::uint32_t> tensor_leaves;  ///< the leaf of each tensor
};

/// What the rows of a device know better than the host: see DeviceRow.
struct RowCells {
  const Cell* from = nullptr;
  Cell* to = nullptr;
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
  /// `stream` is that of a device, or None: the current one of the first array.
  static Handle make(py::handle stream = Py_None);

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
  std::size_t make_sum(PyObject* param, bool waits, const Place& place, py::object& sum);

  /// Instead of leaves: a gradient that a step for this parameter would read. Returns how many
  /// chunks it has.
  std::size_t add_measured(const Leaf& leaf, const LeafNames& names);
  /// Where its sums of squares go.
  void set_chunk_sums(double* sums);

  /// Only checks that an array can be updated.
  void add_output(std::size_t index, PyObject* object, const Place& place);
  /// Only checks that an array can be a state of a parameter.
  void add_state(PyObject* param, const Place& param_place, PyObject* state, const Place& place);
  /// Refuses arrays on several devices, and memory that two arguments share, if one of them is
  /// written.
  void check_memory(const Speller& spell);

  /// From now on a state may be a pair (int8 codes, float32 scales).
  void allow_block_states() { block_states_ = true; }

  /// State buffers that had to be made, in the order of the leaves.
  const std::vector<CreatedState>& created() const { return created_; }

  /// The device of all arrays; the CPU if there are none.
  const Device& device() const { return device_; }
  /// Of a call that is not on the CPU.
  const Gpu& gpu() const { return gpu_; }
  const Stream& stream() const { return stream_.stream(); }

  /// The last checks. `leaves`: how many there are, with those that were not added.
  void prepare(const StepArguments& arguments, std::size_t leaves, const Speller& spell);
  /// The step, on the CPU.
  StepReport run(const Speller& spell, StepCall::Sums sums = StepCall::Sums::none);

  /// Before `prepare`, on a device: an array of one number that the step writes, the `index`-th
  /// scalar of the rule; and that a row uses it, and whether it advances it.
  DeviceNumber add_number(PyObject* object, const Place& place, int index);
  void set_numbers(std::uint32_t row, const DeviceNumber& step, const DeviceNumber& product,
                   bool advances);
  /// After it: where the progress of a row is.
  void set_cells(std::uint32_t row, const RowCells& cells);
  /// Whether the device may decide to skip the step.
  bool may_skip() const;
  /// The step, on its device. `counts` or null: see DeviceCall.
  Launched launch(Workspace& workspace, Counts* counts, StepCall::Sums sums = StepCall::Sums::none);
  /// Waits for it, and raises FloatingPointError if a gradient was not finite.
  DeviceReport wait(const Launched& launched, const Speller& spell) const;

  /// After a step that was not skipped, and after its state and counts are where they belong: runs
  /// Python code, in which an interrupt may surface.
  void tell_producers();

  /// Instead of leaves: gradients alone, and the sum of their squares.
  void add_gradient(std::size_t index, PyObject* object, const Place& place);
  double sum_squares();
  /// The same on a device; waits if somebody wants to know.
  double sum_squares(Workspace& workspace, bool wanted);

 private:
  struct Written {
    const Producer* producer;
    std::vector<PyObject*> objects;  // kept by owners_
  };
  /// Arrays in place of numbers of a row.
  struct RowArrays {
    std::uint32_t row;
    PyObject *lr, *rescale;
  };

  void clear();
  void clear_device();
  void keep(const Leaf& leaf);
  void import_array(PyObject* object, const Place& place, Buffer& out,
                    const void* plain_at = nullptr);
  void meet_device(const Buffer& param, const Place& place, std::uint32_t leaf);
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
  py::object create_state(PyObject* param, const Buffer& buffer, const Place& place);
  void wait_for_zeros(const py::object& made, const Place& place);
  const GradLayout* layout_of(const Buffer& grad, const Buffer& order);
  void add_span(const Buffer& buffer, std::uint32_t leaf, Role role, int slot);
  void note_write(PyObject* object, const Producer& producer);

  void read_numbers(const StepArguments& arguments);
  void read_row_numbers(const RowArrays& arrays);
  void divide_gradients(const Number& scale);
  void read_given_norm(py::handle grad_norm);
  void set_scopes(ClipScope scope);
  void give_each_tensor_a_row();
  bool knows_norm() const { return measures_norm() || given_.has_value(); }
  bool measures_norm() const;
  bool judges() const { return policy_.on_nonfinite != OnNonfinite::propagate; }
  StepCall describe(StepCall::Sums sums) const;
  DeviceCall describe_for_device(StepCall::Sums sums);
  [[noreturn]] void raise_nonfinite(std::int64_t first, const Speller& spell) const;
  void fill(StepReport& report) const;
  template <class Kernels>
  void run_kernels(Kernels kernels) const;

  Owners owners_;
  std::vector<Tensor> tensors_;
  std::vector<std::uint32_t> tensor_leaves_, tensor_groups_;
  std::vector<Row> rows_;
  std::vector<DeviceRow> device_rows_;      ///< beside `rows_`, or empty on the CPU
  std::vector<std::uint32_t> row_origins_;  ///< of the rows that were made for single tensors
  std::vector<RowArrays> row_arrays_;
  std::vector<Span> spans_;
  std::vector<Written> written_;
  std::deque<std::vector<std::int64_t>> extents_;  // deques: tensors point into them
  std::deque<GradLayout> layouts_;
  std::vector<CreatedState> created_;
  std::vector<double> scope_scales_, norms_, tensor_norms_, clip_coefs_;
  std::vector<std::uint32_t> scope_rows_;
  std::int64_t elements_ = 0;
  std::size_t leaves_ = 0;
  bool measures_ = false;
  bool block_states_ = false;

  Device device_;
  Gpu gpu_;
  StreamChoice stream_;
  bool has_device_ = false;
  /// Leaves on different devices: the first one, and one on another.
  std::uint32_t first_leaf_ = 0, odd_leaf_ = 0;
  std::optional<Device> odd_device_;

  Policy policy_;
  std::optional<Number> given_;
  DeviceNumber found_inf_, grad_scale_;
  bool skips_ = false;  ///< `found_inf` is not 0, as the host knows
};

}  // namespace fusedstep::bindings
