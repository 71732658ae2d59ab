#pragma once
#include "core/float16.hpp"
#include "cuda/table.hpp"
#include "rules/rules.hpp"

/// What becomes of a row on the device: its numbers are read where they lie, its rule prepares the
/// coefficients, and its progress goes on. By one thread per row.
namespace fusedstep::cuda {

// --- numbers in device memory -----------------------------------------------------------------

FUSEDSTEP_HD double read_number(const DeviceNumber& number) {
  switch (number.type) {
    case DeviceNumber::Type::float16:
      return static_cast<double>(to_float(*static_cast<const f16*>(number.data)));
    case DeviceNumber::Type::bfloat16:
      return static_cast<double>(to_float(*static_cast<const bf16*>(number.data)));
    case DeviceNumber::Type::float64: return *static_cast<const double*>(number.data);
    case DeviceNumber::Type::int32: return *static_cast<const std::int32_t*>(number.data);
    case DeviceNumber::Type::int64:
      return static_cast<double>(*static_cast<const std::int64_t*>(number.data));
    case DeviceNumber::Type::boolean: return *static_cast<const std::uint8_t*>(number.data) != 0;
    default: return static_cast<double>(*static_cast<const float*>(number.data));
  }
}

/// Into float32, float64, int32 or int64: what counts and products are kept in.
FUSEDSTEP_HD void write_number(double x, const DeviceNumber& number) {
  switch (number.type) {
    case DeviceNumber::Type::float64: *static_cast<double*>(number.data) = x; break;
    case DeviceNumber::Type::int32:
      *static_cast<std::int32_t*>(number.data) = static_cast<std::int32_t>(x);
      break;
    case DeviceNumber::Type::int64:
      *static_cast<std::int64_t*>(number.data) = static_cast<std::int64_t>(x);
      break;
    default: *static_cast<float*>(number.data) = static_cast<float>(x);
  }
}

// --- one row ----------------------------------------------------------------------------------

FUSEDSTEP_HD double rescale_of(const RowRecord& record, const DeviceNumber& grad_scale) {
  double rescale = record.row.rescale_grad;
  if (record.device.rescale.data) rescale *= read_number(record.device.rescale);
  if (grad_scale.data) rescale *= 1.0 / read_number(grad_scale);
  return rescale;
}

/// Of the step to be taken.
FUSEDSTEP_HD Progress progress_of(const RowRecord& record) {
  const DeviceRow& device = record.device;
  Progress progress = record.row.progress;
  if (device.from) {
    progress.step = device.from->steps + 1;
    progress.product = device.from->product;
    progress.first = progress.first || device.from->fresh != 0;
  }
  if (device.step.data) progress.step = static_cast<std::int64_t>(read_number(device.step)) + 1;
  if (device.product.data) progress.product = read_number(device.product);
  return progress;
}

/// Whether the first hyper-parameter of a rule is a learning rate.
template <class Rule>
constexpr bool has_lr = Rule::hypers[0][0] == 'l' && Rule::hypers[0][1] == 'r';

template <class Rule>
FUSEDSTEP_HD void prepare_with(const RowRecord& record, RowConstants& out) {
  const Progress progress{out.step, out.first, out.product_before};
  // A rule without states leaves what another one made as it is.
  out.fresh_after = num_slots<Rule> == 0 && out.first;
  if (record.row.coefficients_given) {
    for (int i = 0; i < length_of<decltype(Rule::coefficients)>; ++i)
      out.coefficients[i] = record.row.hyper[i];
    out.product = progress.product;
    return;
  }
  typename Rule::Hyper hyper = hyper_of<Rule>(record.row);
  if constexpr (has_lr<Rule>) {
    if (record.device.lr.data) hyper.lr = read_number(record.device.lr);
  }
  Rule::prepare(hyper, progress, out.coefficients);
  out.product = product_after<Rule>(hyper, progress);
}

template <class Rule>
struct Tag {
  using type = Rule;
};

/// Calls use(Tag<Rule>{}) for the rule of an index.
template <class... All, class Use>
FUSEDSTEP_HD void for_rule(RuleList<All...> /*rules*/, int index, const Use& use) {
  int at = 0;
  const bool found = ((at++ == index ? (use(Tag<All>{}), true) : false) || ...);
  static_cast<void>(found);
}

/// The same where all rows have one rule.
template <class Rule, class Use>
FUSEDSTEP_HD void for_rule(Tag<Rule> rule, int /*index*/, const Use& use) {
  use(rule);
}

/// `norm` is after rescale_grad; 0 where none is known.
template <class List>
FUSEDSTEP_HD void prepare_row(List rules, const RowRecord& record, const DeviceNumber& grad_scale,
                              double norm, RowConstants& out) {
  const double clip = clip_coefficient(record.row.clip_norm, norm);
  const double rescale = rescale_of(record, grad_scale);
  out.conditioning = conditioning_of(record.row.sign, rescale, clip, record.row.clip_value);
  out.clip_coefficient = clip;
  const Progress progress = progress_of(record);
  out.step = progress.step;
  out.first = progress.first;
  out.product_before = progress.product;
  for_rule(rules, record.row.rule,
           [&](auto tag) { prepare_with<typename decltype(tag)::type>(record, out); });
}

/// After the step. Nobody reads a progress any more.
FUSEDSTEP_HD void advance_row(const RowRecord& record, const RowConstants& constants,
                              bool applied) {
  const DeviceRow& device = record.device;
  if (!device.advances) return;
  if (device.to) {
    *device.to = applied ? Cell{constants.step, constants.product, constants.fresh_after}
                         : Cell{constants.step - 1, constants.product_before, constants.first};
  }
  if (!applied) return;
  if (device.step.data) write_number(static_cast<double>(constants.step), device.step);
  if (device.product.data) write_number(constants.product, device.product);
}

}  // namespace fusedstep::cuda
