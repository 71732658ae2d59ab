// The steps of a plan.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "bindings/device_result.hpp"
#include "bindings/plan_walker.hpp"
#include "bindings/result.hpp"

namespace fusedstep::bindings {

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

  /// A row, and which leaves use it.
  struct Known {
    std::size_t spec;
    int cell;  ///< of the leaves; if they have one, `steps` and `product` are not compared
    std::int64_t steps;
    double product;
    bool first;
    std::uint32_t index;
    std::size_t leaves = 0;
  };

  const std::vector<Known>& rows() const { return rows_; }
  const std::vector<std::uint32_t>& leaf_rows() const { return leaf_rows_; }
  bool has_states(const Known& row) const {
    const auto rule = static_cast<std::size_t>(specs_[row.spec].row.rule);
    return !cpu::rule_infos()[rule].slots.empty();
  }

  /// The running product after the step, by rows.
  std::vector<double> products() const {
    std::vector<double> of_rows;
    for (std::uint32_t k = 0; k < rows_.size(); ++k) {
      of_rows.push_back(cpu::product_after(call_.row(k)));
    }
    return of_rows;
  }

 private:
  void add(std::size_t index, PyObject* grad, PyObject* copy, const LeafNames& names) override {
    Entry& entry = plan_.leaves_[index];
    if (leaf_rows_.empty()) plan_.follow_device(entry);
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
    const bool in_cell = entry.cell != CellTable::none;
    for (auto known = rows_.rbegin(); known != rows_.rend(); ++known) {
      const bool alike =
          known->spec == entry.row && known->first == first && known->cell == entry.cell;
      if (alike && (in_cell || (known->steps == entry.steps && known->product == entry.product))) {
        ++known->leaves;
        return known->index;
      }
    }
    Progress progress{entry.steps + 1, first, entry.product};
    if (in_cell) {
      const CellInfo& info = plan_.device_->cells.info(entry.cell);
      progress = {info.steps + 1, first, info.product};
    }
    const std::uint32_t index = call_.add_row(specs_.at(entry.row), progress);
    rows_.push_back({entry.row, entry.cell, progress.step - 1, progress.product, first, index, 1});
    return index;
  }

  Call& call_;
  const bool accumulated_;
  const bool summed_;  ///< the chunk sums of all gradients are known
  std::vector<RowSpec> specs_;
  std::vector<Known> rows_;
  std::vector<std::uint32_t> leaf_rows_;
};

py::object Plan::step(py::handle grads, const py::sequence& rows, const StepOptions& options) {
  const Busy busy(turn_);
  const bool accumulated = any_accumulated();
  if (accumulated && !grads.is_none()) {
    throw py::value_error(
        "grads: gradients were accumulated and wait for a step; call step() without any, or "
        "accumulate these too, or drop the others with zero_grad()");
  }
  const Call::Handle call = Call::make(options.stream);
  const bool summed = accumulated || options.observed;
  const auto sums = summed ? StepCall::Sums::of_gradients : StepCall::Sums::none;
  StepFiller filler(*this, *call, rows, accumulated, summed);
  walk_trees(filler, grads, options.param_copy);
  const StepArguments arguments{parse_policy(options.policy), options.grad_norm, options.found_inf,
                                options.grad_scale};
  call->prepare(arguments, leaves_.size(), speller());
  if (!filler.added().empty()) check_device(*call);
  if (!call->device().is_cpu()) {
    py::object result = step_on_device(*call, filler, arguments.policy, sums);
    if (!options.stream.is_none()) device_->last_is_seen = false;
    if (accumulated) drop_accumulated(false);
    call->tell_producers();
    return result;
  }
  const StepReport report = call->run(speller(), sums);
  if (accumulated) drop_accumulated(false);
  if (!report.skipped) {
    commit(*call, filler);
    call->tell_producers();
  }
  return make_result(report, py::dict());
}

/// For a step that is told so: what arrives one by one, as autograd makes it, is measured while it
/// is in cache.
void Plan::observe(std::size_t index, py::handle grad, py::handle stream) {
  const Busy busy(turn_);
  Entry& entry = at(index);
  follow_device(entry);
  const std::vector<Path> path = path_of(entry);
  Leaf leaf{entry.param.ptr(), grad.ptr(), nullptr, {}};
  leaf.known = &entry.known;
  const Call::Handle call = Call::make(stream);
  const std::size_t chunks =
      call->add_measured(leaf, {names_[entry.tree].c_str(), grad_names_[entry.tree].c_str(),
                                nullptr, path.empty() ? nullptr : &path.back()});
  entry.sum_squares.resize(chunks, arena_of(*call));
  if (chunks == 0) return;
  call->set_chunk_sums(entry.sum_squares.data());
  if (call->device().is_cpu()) {
    call->sum_squares();
  } else {
    call->sum_squares(device_side(*call).workspace, false);
    if (call->gpu().is_capturing(call->stream())) note_capture({index});
  }
}

void Plan::commit(const Call& call, const StepFiller& filler) {
  keep_created(call, false);
  const std::vector<double> products = filler.products();
  for (std::size_t k = 0; k < filler.added().size(); ++k) {
    Entry& entry = leaves_[filler.added()[k]];
    ++entry.steps;
    entry.product = products[filler.leaf_rows()[k]];
  }
}

void Plan::keep_created(const Call& call, bool may_be_skipped) {
  for (const CreatedState& created : call.created()) {
    const auto slot = static_cast<std::size_t>(slot_index(created.rule, created.slot));
    leaves_[created.leaf].states[slot] = created.buffer;
    leaves_[created.leaf].fresh[slot] = may_be_skipped;
  }
}

// ---- on a device ------------------------------------------------------------------------------

/// The cells that the rows of a step go to. Those that were taken for it go back unless the step
/// was taken.
class Plan::NewCells {
 public:
  NewCells(DeviceSide& side, const StepFiller& filler) : side_(side) {
    for (const StepFiller::Known& row : filler.rows()) {
      cells_.push_back(row.cell);
      if (row.cell != CellTable::none && side.cells.info(row.cell).leaves == row.leaves) continue;
      cells_.back() = CellTable::none;
    }
  }
  ~NewCells() {
    for (const int cell : taken_) side_.cells.put_back(cell);
  }
  NewCells(const NewCells&) = delete;
  NewCells& operator=(const NewCells&) = delete;

  bool complete() const {
    return std::find(cells_.begin(), cells_.end(), CellTable::none) == cells_.end();
  }
  int of_row(std::uint32_t row) const { return cells_[row]; }

  /// Makes the missing ones: all leaves of a cell advance together, and nobody writes a cell that
  /// another row reads.
  void make(const StepFiller& filler, const Stream& stream) {
    for (const StepFiller::Known& row : filler.rows()) {
      int& cell = cells_[row.index];
      if (cell != CellTable::none) continue;
      if (row.cell != CellTable::none && side_.cells.info(row.cell).pinned) {
        throw std::runtime_error(
            "a captured CUDA graph advances some of these arrays together with others; give "
            "gradients to the same arrays as in the captured step, or use another optimizer "
            "object");
      }
      cell = side_.cells.take();
      taken_.push_back(cell);
      if (row.cell != CellTable::none) continue;  // the step writes it whole
      const Cell start{row.steps, row.product, 0};
      side_.gpu.copy_in(stream, "the progress of an optimizer", side_.cells.at(cell), &start,
                        sizeof start);
    }
  }
  void keep() { taken_.clear(); }

 private:
  DeviceSide& side_;
  std::vector<int> cells_, taken_;  ///< of the rows; those of them that are new
};

namespace {

/// States that had to be made for leaves which have others: a hyper-parameter has changed.
bool has_late_states(const Call& call) {
  const auto& created = call.created();
  for (std::size_t k = 0; k < created.size(); ++k) {
    const bool follows = k > 0 && created[k - 1].leaf == created[k].leaf;
    if (created[k].slot != 0 && !follows) return true;
  }
  return false;
}

}  // namespace

py::object Plan::step_on_device(Call& call, const StepFiller& filler, const Policy& policy,
                                StepCall::Sums sums) {
  DeviceSide& side = device_side(call);
  const bool capturing = side.gpu.is_capturing(call.stream());
  // Whether to keep a state that is not made for a first step is nothing that a cell tells.
  const bool waits =
      policy.on_nonfinite == OnNonfinite::raise || (call.may_skip() && has_late_states(call));
  if (capturing && waits) {
    throw std::runtime_error(
        "on_nonfinite='raise' reads the result of the step, which cannot be while its stream is "
        "being captured into a CUDA graph; use 'skip'");
  }
  NewCells cells(side, filler);
  if (capturing && !cells.complete()) {
    throw std::runtime_error(
        "take one step with gradients for the same arrays before capturing one into a CUDA graph");
  }
  cells.make(filler, call.stream());
  for (const StepFiller::Known& row : filler.rows()) {
    const int to = cells.of_row(row.index), from = row.cell == CellTable::none ? to : row.cell;
    call.set_cells(row.index, {side.cells.at(from), side.cells.at(to)});
  }
  const bool decides = capturing || (call.may_skip() && !waits);
  Launched launched =
      call.launch(side.workspace, decides ? side.counts.on_device(capturing) : nullptr, sums);
  if (capturing) {
    note_capture(filler.added());
  } else {
    side.last = call.stream();
    side.last_is_seen = true;
  }
  const bool applied = launched.report && !(waits && call.wait(launched, speller()).skipped);
  if (applied) {
    keep_created(call, decides);
    move_to(cells, filler, decides, capturing);
  }
  if (!applied && (!decides || !launched.report)) side.counts.add_skipped();
  if (applied && !decides) side.counts.add_applied();
  py::dict state;
  return make_device_result(std::move(launched), state, state, waits);
}

/// After a step was put into its stream: the progress of its leaves is where the step puts it.
void Plan::move_to(NewCells& cells, const StepFiller& filler, bool device_decides, bool captured) {
  CellTable& table = device_->cells;
  const std::vector<double> products = filler.products();
  for (const StepFiller::Known& row : filler.rows()) {
    const int cell = cells.of_row(row.index);
    const CellInfo from = row.cell == CellTable::none ? CellInfo() : table.info(row.cell);
    CellInfo& info = table.info(cell);
    info.steps = row.steps + 1;
    info.product = products[row.index];
    info.exact = from.exact && !device_decides && !info.pinned;
    info.fresh = from.fresh && !filler.has_states(row);
    if (captured) table.pin(cell);
  }
  for (std::size_t k = 0; k < filler.added().size(); ++k) {
    Entry& entry = leaves_[filler.added()[k]];
    const int cell = cells.of_row(filler.leaf_rows()[k]);
    if (entry.cell == cell) continue;
    if (entry.cell != CellTable::none) table.leave(entry.cell);
    table.join(cell);
    entry.cell = cell;
  }
  cells.keep();
}

// ---- where the device keeps things ------------------------------------------------------------

/// `module.to()` takes parameters to another device. A call is where the first of its leaves is,
/// which is the one to be asked: those that take no part in it may have stayed behind.
void Plan::follow_device(const Entry& entry) {
  if (!device_) return;
  Owners owners;
  Buffer buffer;
  const Place place{names_[entry.tree].c_str(), nullptr};
  import_buffer(entry.param.ptr(), place, owners, buffer);
  const bool stays = !buffer.device.is_cpu() && find_gpu(buffer.device, place) == device_->gpu;
  if (!stays) leave_device();
}

/// Importing runs code of others: the rows were made for leaves whose cells are where the call is.
void Plan::check_device(const Call& call) const {
  if (!device_ || (!call.device().is_cpu() && call.gpu() == device_->gpu)) return;
  throw std::runtime_error("the parameters went to another device while a step read them");
}

void Plan::leave_device() {
  take_device_counts();
  settle();
  for (Entry& entry : leaves_) {
    detach(entry);
    entry.sum_squares = ChunkSums();
  }
  device_.reset();
}

DeviceSide& Plan::device_side(const Call& call) {
  if (device_ && device_->gpu != call.gpu()) leave_device();
  if (!device_) {
    refuse_capture(call.gpu(), call.stream(), "the first step of an optimizer cannot be taken");
    device_ = std::make_unique<DeviceSide>(call.gpu());
  }
  return *device_;
}

Arena* Plan::arena_of(const Call& call) {
  return call.device().is_cpu() ? nullptr : &device_side(call).arena;
}

/// A graph may be replayed at any time, whatever becomes of the plan and of what it holds: other
/// states may be loaded, leaves registered anew. So what it writes is there for good.
void Plan::note_capture(const std::vector<std::size_t>& leaves) {
  device_->captured = true;
  for (const std::size_t leaf : leaves) {
    const Entry& entry = leaves_[leaf];
    for (const py::object& state : entry.states) state.inc_ref();
    entry.sum.inc_ref();
  }
}

Stream Plan::library_stream() const {
  PyObject* const array = leaves_[0].param.ptr();
  bool known = false;
  return current_stream(array, producer_of(array), device_->gpu.id, &known);
}

/// Where what steps have left can be read. A graph is replayed in any stream, which nobody here is
/// told: all have to have run then.
Stream Plan::reading_stream() const {
  if (!device_->captured) return device_->last;
  Stream stream = library_stream();
  refuse_capture(device_->gpu, stream, "what steps have done cannot be read");
  device_->gpu.synchronize();
  return stream;
}

/// Who gets states reads them in the order of their library's stream, which knows nothing of one
/// that was given to the last step.
void Plan::wait_for_last_step() {
  if (!device_ || device_->last_is_seen) return;
  if (library_stream().handle == device_->last.handle) return;
  device_->counts.look(device_->gpu, device_->last);
  device_->last_is_seen = true;
}

void Plan::settle() {
  if (!device_ || device_->cells.knows_all()) return;
  device_->cells.settle(device_->gpu, reading_stream());
}

/// From now on the host keeps the progress of a leaf, which has been settled.
void Plan::detach(Entry& entry) {
  if (entry.cell == CellTable::none) return;
  const CellInfo& known = device_->cells.info(entry.cell);
  entry.steps = known.steps;
  entry.product = known.product;
  for (std::size_t k = 0; k < max_slots; ++k) {
    if (known.fresh && entry.fresh[k]) entry.states[k] = py::object();
  }
  entry.fresh = {};
  device_->cells.leave(entry.cell);
  entry.cell = CellTable::none;
}

void Plan::take_device_counts() {
  if (!device_) return;
  const bool unsure = device_->counts.is_unsure();
  const Counts more = device_->counts.take(device_->gpu, unsure ? reading_stream() : Stream());
  counts_.applied += more.applied;
  counts_.skipped += more.skipped;
}

py::tuple Plan::take_counts() {
  const Reading reading(turn_);
  take_device_counts();
  const Counts taken = std::exchange(counts_, Counts{});
  return py::make_tuple(taken.applied, taken.skipped);
}

}  // namespace fusedstep::bindings
