#include <algorithm>
#include <limits>
#include <vector>

#include "core/float16.hpp"
#include "core/float_env.hpp"
#include "core/gradient.hpp"
#include "xla/handlers.hpp"
#include "xla/settings.hpp"

namespace fusedstep::xla {

namespace {

constexpr double unknown = std::numeric_limits<double>::quiet_NaN();

/// One number, widened exactly.
double number_in(const ffi::AnyBuffer& buffer) {
  const void* data = buffer.untyped_data();
  const auto one = [&](auto x) {
    std::memcpy(&x, data, sizeof x);
    return x;
  };
  if (buffer.element_type() == ffi::U32) {
    require(num_doubles(buffer) == 1, "a number is of two words");
    return double_at(buffer, 0);
  }
  require(buffer.element_count() == 1, "a number has one element");
  switch (dtype_of(buffer)) {
    case DType::float64: return one(0.0);
    case DType::float16: return to_float(one(f16{}));
    case DType::bfloat16: return to_float(one(bf16{}));
    default: return one(0.0f);
  }
}

void put_number(const ffi::AnyBuffer& out, double x) {
  const bool wide = out.element_type() == ffi::F64;
  const float narrow = static_cast<float>(x);
  std::memcpy(out.untyped_data(), wide ? static_cast<const void*>(&x) : &narrow,
              wide ? sizeof x : sizeof narrow);
}

/// The norms of a step: joined over shards, of all leaves together or of each.
struct Norms {
  std::vector<double> joined;
  bool known = false;

  /// `parts` holds `columns` norms of each shard.
  static double join(const ffi::AnyBuffer& parts, std::size_t column, std::size_t columns,
                     std::vector<double>& scratch) {
    scratch.clear();
    for (std::size_t i = column; i < num_doubles(parts); i += columns)
      scratch.push_back(double_at(parts, i));
    return core->join_norms(scratch.data(), static_cast<std::int64_t>(scratch.size()));
  }
};

/// `parts`: [shards, norms, 2] of groups of leaves. `order` lists the leaves of all groups.
Norms read_norms(const std::vector<ffi::AnyBuffer>& parts, ffi::Span<const std::int64_t> order,
                 bool per_array, std::size_t leaves) {
  Norms norms;
  norms.known = !parts.empty();
  std::vector<double> scratch, all;
  norms.joined.assign(per_array ? leaves : 1, parts.empty() ? unknown : 0.0);
  std::size_t at = 0;
  for (const ffi::AnyBuffer& part : parts) {
    require(part.dimensions().size() == 3, "norms are [shards, norms, 2]");
    const auto columns = static_cast<std::size_t>(part.dimensions()[1]);
    for (std::size_t k = 0; k < columns; ++k) {
      all.push_back(Norms::join(part, k, columns, scratch));
      if (!per_array) continue;
      require(at < order.size(), "a norm without a leaf");
      norms.joined.at(static_cast<std::size_t>(order[at++])) = all.back();
    }
  }
  if (!per_array && norms.known)
    norms.joined[0] = core->join_norms(all.data(), static_cast<std::int64_t>(all.size()));
  return norms;
}

struct Decision {
  double norm = unknown, clip_coef = 1.0;
  bool skipped = false;
};

/// Whether the step is taken: what the core decides about a step on no tensors.
Decision decide(const Row& row, double skip_norm, const Norms& norms, bool judge) {
  const std::vector<double> scales(norms.joined.size(), std::fabs(row.rescale_grad));
  std::vector<double> scaled(norms.joined.size(), unknown);
  Decision decision;
  StepCall call{};
  call.rows = &row;
  call.num_rows = 1;
  call.num_scopes = static_cast<int>(norms.joined.size());
  call.scope_scale = scales.data();
  call.joint = norms.joined.size() == 1;
  call.skip_nonfinite = judge;
  call.skip_norm = skip_norm;
  call.given_norms = norms.known ? norms.joined.data() : nullptr;
  StepOutcome outcome{};
  outcome.norms = scaled.data();
  outcome.clip_coefs = &decision.clip_coef;
  outcome.norm = unknown;
  if (norms.joined.empty()) {  // each of no arrays
    decision.norm = norms.known ? 0.0 : unknown;
    return decision;
  }
  run(call, outcome);
  decision.norm = outcome.norm;
  decision.skipped = outcome.skipped;
  for (std::size_t k = 0; norms.known && k < scaled.size(); ++k) {
    const double coef = clip_coefficient(row.clip_norm, scaled[k]);
    decision.clip_coef = smaller_coefficient(decision.clip_coef, coef);
  }
  return decision;
}

// --- the handler ------------------------------------------------------------------------------

/// What is known when a program is compiled.
struct Attributes {
  std::int64_t rule;
  ffi::Span<const double> settings;
  ffi::Span<const std::int64_t> traced;  ///< positions of the settings that come as operands
  ffi::Span<const std::int64_t> leaves;  ///< those with a gradient
  ffi::Span<const std::int64_t> order;   ///< the leaves that `per_array` norms belong to
  bool norm_given, judge, per_array;
};

struct Results {
  Words settled;
  ffi::AnyBuffer norm, clip_coef, lr;
  ffi::Buffer<ffi::PRED> skipped;
  ffi::Buffer<ffi::S32> steps;
  Words products;
};

/// The settings, with those put in that come as operands.
Settings read_settings(const Attributes& known, const ffi::RemainingArgs& args) {
  require(core->num_slots(known.rule) >= 0, "no such rule");
  require(known.settings.size() == num_settings, "another number of settings");
  double values[num_settings];
  std::copy(known.settings.begin(), known.settings.end(), values);
  for (std::size_t k = 0; k < known.traced.size(); ++k) {
    const auto position = static_cast<std::size_t>(known.traced[k]);
    require(position < num_settings, "no such setting");
    values[position] = number_in(operand(args, k));
  }
  Settings settings;
  std::memcpy(&settings, values, sizeof settings);
  return settings;
}

/// The counts after the step of the leaves that take part in it.
void advance(const Counts& before, Row row, ffi::Span<const std::int64_t> leaves,
             const Results& after) {
  double product = 1.0;
  Progress of{};  // what `product` follows from: most leaves have come equally far
  for (const std::int64_t index : leaves) {
    const auto leaf = static_cast<std::size_t>(index);
    require(leaf < after.steps.element_count(), "no such leaf");
    const Progress next = before.next(leaf);
    after.steps.typed_data()[leaf] = static_cast<std::int32_t>(next.step);
    if (!before.has_products()) continue;
    if (!(next == of)) {
      row.progress = of = next;
      product = core->product_after(&row);
    }
    put_double(after.products, leaf, product);
  }
}

void report(const Settled& settled, const Norms& norms, const Decision& decision,
            const Results& out) {
  require(num_doubles(out.settled) == num_settled + norms.joined.size(), "another size");
  std::memcpy(out.settled.untyped_data(), &settled, sizeof settled);
  for (std::size_t k = 0; k < norms.joined.size(); ++k)
    put_double(out.settled, num_settled + k, norms.joined[k]);
  put_number(out.norm, norms.known ? decision.norm : -1.0);  // NaN would trip `jax_debug_nans`
  put_number(out.clip_coef, decision.clip_coef);
  put_number(out.lr, settled.settings.hyper[0]);
  *out.skipped.typed_data() = decision.skipped;
}

void settle(const ffi::Buffer<ffi::S32>& steps, const Words& products,
            const ffi::RemainingArgs& args, const Attributes& known, const Results& out) {
  const FloatEnvironment environment;
  const Settings settings = read_settings(known, args);
  const Row row = row_of(static_cast<int>(known.rule), settings);
  std::size_t at = known.traced.size() + known.norm_given;
  std::vector<ffi::AnyBuffer> parts;
  while (at < args.size()) parts.push_back(operand(args, at++));
  Norms norms = read_norms(parts, known.order, known.per_array, steps.element_count());
  bool finite = true;
  if (known.norm_given) {  // the gradients were measured only to see whether they are finite
    finite = !norms.known || std::isfinite(norms.joined.at(0));
    norms = {{number_in(operand(args, known.traced.size()))}, true};
  }
  Decision decision = decide(row, settings.skip_norm, norms, known.judge);
  decision.skipped |= known.judge && !finite;

  std::memcpy(out.steps.untyped_data(), steps.untyped_data(), steps.size_bytes());
  std::memcpy(out.products.untyped_data(), products.untyped_data(), products.size_bytes());
  if (!decision.skipped) advance({steps.typed_data(), products}, row, known.leaves, out);
  report({decision.skipped ? 1.0 : 0.0, norms.known ? 1.0 : 0.0, settings}, norms, decision, out);
}

ffi::Error call(ffi::Buffer<ffi::S32> steps, Words products, ffi::RemainingArgs args,
                ffi::Result<Words> settled, ffi::Result<ffi::AnyBuffer> norm,
                ffi::Result<ffi::AnyBuffer> clip_coef, ffi::Result<ffi::AnyBuffer> lr,
                ffi::Result<ffi::Buffer<ffi::PRED>> skipped,
                ffi::Result<ffi::Buffer<ffi::S32>> new_steps, ffi::Result<Words> new_products,
                std::int64_t rule, ffi::Span<const double> settings,
                ffi::Span<const std::int64_t> traced, ffi::Span<const std::int64_t> leaves,
                ffi::Span<const std::int64_t> order, bool norm_given, bool judge, bool per_array) {
  const Attributes known{rule, settings, traced, leaves, order, norm_given, judge, per_array};
  const Results out{*settled, *norm, *clip_coef, *lr, *skipped, *new_steps, *new_products};
  return guarded("fusedstep.settle", [&] { settle(steps, products, args, known, out); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedstep_settle_cpu, call,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Words>()
                                  .RemainingArgs()
                                  .Ret<Words>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<Words>()
                                  .Attr<std::int64_t>("rule")
                                  .Attr<ffi::Span<const double>>("settings")
                                  .Attr<ffi::Span<const std::int64_t>>("traced")
                                  .Attr<ffi::Span<const std::int64_t>>("leaves")
                                  .Attr<ffi::Span<const std::int64_t>>("order")
                                  .Attr<bool>("norm_given")
                                  .Attr<bool>("judge")
                                  .Attr<bool>("per_array"));

}  // namespace fusedstep::xla
