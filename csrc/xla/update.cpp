#include <vector>

#include "xla/executor.hpp"
#include "xla/gradients.hpp"
#include "xla/handlers.hpp"
#include "xla/settings.hpp"

namespace fusedstep::xla {

namespace {

/// What is known when a program is compiled.
struct Attributes {
  std::int64_t rule, slots;
  ffi::Span<const std::int64_t> leaves;  ///< which leaf of the tree each parameter is
  ffi::Span<const double> decays;        ///< of each parameter, if they have their own
  std::int64_t decay_position;           ///< of `weight_decay` among the hyper-parameters
  bool per_array;                        ///< each parameter has a norm of its own
};

/// Operands are parameters, gradients, then the states of each slot; results are parameters, then
/// states.
struct Arrays {
  const ffi::RemainingArgs& args;
  const ffi::RemainingRets& rets;
  std::size_t count, slots;

  std::size_t operand_of(std::size_t output) const {
    return output < count ? output : output + count;
  }
  std::size_t num_outputs() const { return count * (1 + slots); }
};

/// XLA aliases operands and results where it can. Where it did not, the kernels work in the result.
void copy_unaliased(const Arrays& arrays) {
  for (std::size_t i = 0; i < arrays.num_outputs(); ++i) {
    const ffi::AnyBuffer from = operand(arrays.args, arrays.operand_of(i));
    const ffi::AnyBuffer to = result(arrays.rets, i);
    require(from.size_bytes() == to.size_bytes() && from.element_type() == to.element_type(),
            "a result is not like its operand");
    if (to.untyped_data() != from.untyped_data() && to.size_bytes() > 0)
      std::memcpy(to.untyped_data(), from.untyped_data(), to.size_bytes());
  }
}

/// One call into the core.
class Update {
 public:
  Update(const Arrays& arrays, const Attributes& known, const Counts& counts, const Words& settled)
      : arrays_(arrays), known_(known), counts_(counts), words_(settled), gradients_(arrays.count) {
    std::memcpy(&settled_, settled.untyped_data(), sizeof settled_);
    for (std::size_t i = 0; i < arrays.count; ++i) add(i);
  }

  void run_on(const PoolExecutor& pool) {
    if (tensors_.empty()) return;
    std::vector<double> norms(given_.size()), coefs(rows_.size());
    const std::vector<double> scales(given_.size(), std::fabs(settled_.settings.rescale_grad));
    StepCall call{};
    call.tensors = tensors_.data();
    call.num_tensors = static_cast<std::int64_t>(tensors_.size());
    call.rows = rows_.data();
    call.num_rows = static_cast<int>(rows_.size());
    call.num_scopes = static_cast<int>(given_.size());
    call.scope_scale = scales.data();
    call.joint = !known_.per_array;
    call.given_norms = settled_.norm_known != 0 ? given_.data() : nullptr;
    pool.use_in(call);
    StepOutcome outcome{};
    outcome.norms = norms.data();
    outcome.clip_coefs = coefs.data();
    run(call, outcome);
  }

 private:
  void add(std::size_t i) {
    const ffi::AnyBuffer param = result(arrays_.rets, i);
    const ffi::AnyBuffer grad = operand(arrays_.args, arrays_.count + i);
    Tensor tensor{};
    tensor.numel = static_cast<std::int64_t>(param.element_count());
    if (tensor.numel == 0) return;
    require(grad.element_count() == param.element_count(), "a gradient of another size");
    tensor.param = param.untyped_data();
    tensor.param_dtype = dtype_of(param);
    gradients_.fill(tensor, grad);
    for (std::size_t s = 0; s < arrays_.slots; ++s) {
      const ffi::AnyBuffer state = result(arrays_.rets, arrays_.count * (1 + s) + i);
      require(state.element_count() == param.element_count(), "a state of another size");
      tensor.slots[s] = {state.untyped_data(), nullptr, dtype_of(state)};
    }
    const auto leaf = static_cast<std::size_t>(known_.leaves[i]);
    tensor.row = row_for(i, leaf);
    tensor.scope = scope_for(leaf);
    tensors_.push_back(tensor);
  }

  /// The row of the parameter before, where that has come as far and is treated alike.
  std::uint32_t row_for(std::size_t i, std::size_t leaf) {
    Row row = row_of(static_cast<int>(known_.rule), settled_.settings);
    row.progress = counts_.next(leaf);
    double& decay = row.hyper[known_.decay_position];
    if (known_.decays.size() > 0) decay = known_.decays[i];
    const bool alike = !rows_.empty() && !known_.per_array &&
                       rows_.back().progress == row.progress &&
                       rows_.back().hyper[known_.decay_position] == decay;
    if (!alike) rows_.push_back(row);
    return static_cast<std::uint32_t>(rows_.size() - 1);
  }

  std::uint32_t scope_for(std::size_t leaf) {
    if (given_.empty() || known_.per_array)
      given_.push_back(double_at(words_, num_settled + (known_.per_array ? leaf : 0)));
    return static_cast<std::uint32_t>(given_.size() - 1);
  }

  const Arrays& arrays_;
  const Attributes& known_;
  const Counts& counts_;
  const Words& words_;
  Settled settled_;
  Gradients gradients_;
  std::vector<Tensor> tensors_;
  std::vector<Row> rows_;
  std::vector<double> given_;  ///< a norm for each scope
};

void check(const Arrays& arrays, const Attributes& known, const Words& settled,
           std::size_t leaves) {
  require(known.slots >= 0 && known.slots == core->num_slots(known.rule), "another rule's states");
  require(arrays.args.size() == arrays.count * (2 + arrays.slots), "another number of operands");
  require(arrays.rets.size() == arrays.num_outputs(), "another number of results");
  require(known.decays.size() == 0 || known.decays.size() == arrays.count, "a decay for each");
  require(known.decay_position >= 0 && known.decay_position < max_hypers, "no such position");
  require(num_doubles(settled) == num_settled + (known.per_array ? leaves : 1), "another size");
  for (const std::int64_t leaf : known.leaves)
    require(leaf >= 0 && static_cast<std::size_t>(leaf) < leaves, "no such leaf");
}

ffi::Error update(ffi::ThreadPool pool, Words settled, ffi::Buffer<ffi::S32> steps, Words products,
                  ffi::RemainingArgs args, ffi::RemainingRets rets, std::int64_t rule,
                  std::int64_t slots, ffi::Span<const std::int64_t> leaves,
                  ffi::Span<const double> decays, std::int64_t decay_position, bool per_array) {
  return guarded("fusedstep.update", [&] {
    const Attributes known{rule, slots, leaves, decays, decay_position, per_array};
    const Arrays arrays{args, rets, leaves.size(), static_cast<std::size_t>(slots)};
    const Counts counts{steps.typed_data(), products};
    check(arrays, known, settled, steps.element_count());
    copy_unaliased(arrays);
    if (double_at(settled, 0) != 0) return;  // skipped
    Update(arrays, known, counts, settled).run_on(PoolExecutor(pool));
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedstep_update_cpu, update,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Words>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Words>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::int64_t>("rule")
                                  .Attr<std::int64_t>("slots")
                                  .Attr<ffi::Span<const std::int64_t>>("leaves")
                                  .Attr<ffi::Span<const double>>("decays")
                                  .Attr<std::int64_t>("decay_position")
                                  .Attr<bool>("per_array"));

}  // namespace fusedstep::xla
