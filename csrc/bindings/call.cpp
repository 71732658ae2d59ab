#include "bindings/call.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "bindings/gil.hpp"
#include "core/gradient.hpp"
#include "cpu/step.hpp"
#include "cpu/threads.hpp"

namespace fusedstep::bindings {

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
/// Shorter steps than this keep the GIL: giving it up costs more than it could win.
constexpr std::int64_t min_elements_without_gil = 16384;

thread_local std::unique_ptr<Call> spare;  // not a Handle: deleted when the thread ends

std::string text_of(double number) {
  return static_cast<std::string>(py::repr(py::float_(number)));
}

}  // namespace

// ---- life -------------------------------------------------------------------------------------

Call::Handle Call::make(py::handle stream) {
  // Importing may run Python code that steps something else: then there is no spare to take.
  Handle call(spare ? spare.release() : new Call());
  call->stream_.give(stream);
  return call;
}

void Call::Recycle::operator()(Call* call) const {
  call->clear();
  spare.reset(call);
}

void Call::clear() {
  owners_.clear();
  tensors_.clear();
  tensor_leaves_.clear();
  tensor_groups_.clear();
  rows_.clear();
  row_arrays_.clear();
  measures_ = false;
  spans_.clear();
  for (Written& written : written_) written.objects.clear();
  extents_.clear();
  layouts_.clear();
  created_.clear();
  elements_ = 0;
  leaves_ = 0;
  block_states_ = false;
  has_device_ = false;
  odd_device_.reset();
  if (!device_.is_cpu() || stream_.is_chosen()) clear_device();
}

void Call::clear_device() {
  device_ = {};
  gpu_ = {};
  stream_.clear();
  device_rows_.clear();
  row_origins_.clear();
}

// ---- running ----------------------------------------------------------------------------------

void Call::check_memory(const Speller& spell) {
  if (odd_device_) {
    throw py::value_error(spell(odd_leaf_, Role::param, 0) + " is on " + odd_device_->spell() +
                          ", but " + spell(first_leaf_, Role::param, 0) + " is on " +
                          device_.spell() + "; the arrays of a call have to be on one device");
  }
  const auto overlap = find_overlap(spans_);
  if (!overlap) return;
  const auto& [a, b] = *overlap;
  const std::string text = spell(a.leaf, a.role, a.slot) + " and " + spell(b.leaf, b.role, b.slot) +
                           " overlap in memory; each output needs memory of its own";
  PyErr_SetString(PyExc_BufferError, text.c_str());
  throw py::error_already_set();
}

// ---- numbers ----------------------------------------------------------------------------------

void Call::read_numbers(const StepArguments& arguments) {
  for (const RowArrays& arrays : row_arrays_) read_row_numbers(arrays);
  found_inf_ = grad_scale_ = {};
  skips_ = false;
  if (!arguments.grad_scale.is_none()) {
    divide_gradients(parse_number(arguments.grad_scale.ptr(), {"grad_scale", nullptr}, false,
                                  device_, owners_, &stream_));
  }
  if (arguments.found_inf.is_none()) return;
  const Number found = parse_number(arguments.found_inf.ptr(), {"found_inf", nullptr}, true,
                                    device_, owners_, &stream_);
  found_inf_ = found.device;
  skips_ = !found.is_on_device() && found.value != 0;
}

void Call::read_row_numbers(const RowArrays& arrays) {
  Row& row = rows_[arrays.row];
  if (arrays.lr != nullptr) {
    const Number lr = parse_number(arrays.lr, {"lr", nullptr}, false, device_, owners_, &stream_);
    const bool fits = lr.value >= 0 && lr.value < infinity;
    if (!fits) throw py::value_error("lr: expected a number >= 0, got " + text_of(lr.value));
    row.hyper[0] = lr.value;
    if (lr.is_on_device()) device_rows_[arrays.row].lr = lr.device;
  }
  if (arrays.rescale == nullptr) return;
  const Number rescale =
      parse_number(arrays.rescale, {"rescale_grad", nullptr}, false, device_, owners_, &stream_);
  if (rescale.is_on_device()) {
    device_rows_[arrays.row].rescale = rescale.device;
    return;
  }
  if (!std::isfinite(rescale.value)) {
    throw py::value_error("rescale_grad: expected a finite number, got " + text_of(rescale.value));
  }
  row.rescale_grad = rescale.value;
}

void Call::divide_gradients(const Number& scale) {
  grad_scale_ = scale.device;
  if (scale.is_on_device()) return;
  for (Row& row : rows_) row.rescale_grad *= 1.0 / scale.value;
}

void Call::read_given_norm(py::handle grad_norm) {
  given_.reset();
  if (grad_norm.is_none()) return;
  given_ = parse_number(grad_norm.ptr(), {"grad_norm", nullptr}, false, device_, owners_, &stream_);
  if (given_->value < 0) {
    throw py::value_error("grad_norm: expected a norm >= 0, got " + brief(grad_norm.ptr()));
  }
  if (scope_scales_.size() > 1) {
    throw py::value_error(
        "grad_norm: one norm does not say enough when groups differ in rescale_grad (rescale the "
        "gradients instead) or are clipped by norms of their own (grad_clip_scope)");
  }
}

// ---- running ----------------------------------------------------------------------------------

/// With one norm for all, tensors of equal rescale_grad share one tree, whatever groups there are:
/// then the bits of the norm do not depend on the grouping.
void Call::set_scopes(ClipScope scope) {
  if (scope == ClipScope::array) give_each_tensor_a_row();
  scope_scales_.clear();
  scope_rows_.clear();
  const void* number = nullptr;  // of the last scope
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    const std::uint32_t row = tensors_[t].row;
    const double scale = std::fabs(rows_[row].rescale_grad);
    const void* const own = device_.is_cpu() ? nullptr : device_rows_[row].rescale.data;
    const bool differs = t == 0 || scope_scales_.back() != scale || number != own;
    const bool begins =
        t == 0 || scope == ClipScope::array ||
        (scope == ClipScope::group ? tensor_groups_[t] != tensor_groups_[t - 1] : differs);
    number = own;
    if (begins) {
      scope_scales_.push_back(scale);
      scope_rows_.push_back(row);
    }
    tensors_[t].scope = static_cast<std::uint32_t>(scope_scales_.size() - 1);
  }
  if (!scope_scales_.empty()) return;
  scope_scales_.push_back(1.0);
  scope_rows_.push_back(0);
}

/// The tensors of a row are clipped alike.
void Call::give_each_tensor_a_row() {
  std::vector<bool> taken(rows_.size(), false);
  for (Tensor& tensor : tensors_) {
    const std::uint32_t origin = tensor.row;
    if (taken[origin]) {
      rows_.push_back(Row(rows_[origin]));
      tensor.row = static_cast<std::uint32_t>(rows_.size() - 1);
      if (device_.is_cpu()) continue;
      device_rows_.push_back(DeviceRow(device_rows_[origin]));
      row_origins_.push_back(origin);
    } else {
      taken[origin] = true;
    }
  }
}

bool Call::measures_norm() const {
  const bool asked = measures_ || policy_.skip_norm != infinity;
  return judges() || (asked && !given_);
}

template <class Kernels>
void Call::run_kernels(Kernels kernels) const {
  elements_ < min_elements_without_gil ? kernels() : without_gil(kernels);
}

void Call::prepare(const StepArguments& arguments, std::size_t leaves, const Speller& spell) {
  check_memory(spell);
  policy_ = arguments.policy;
  leaves_ = leaves;
  if (!device_.is_cpu()) device_rows_.resize(rows_.size());
  read_numbers(arguments);
  set_scopes(policy_.clip_scope);
  read_given_norm(arguments.grad_norm);
}

StepCall Call::describe(StepCall::Sums sums) const {
  StepCall call{};
  call.tensors = tensors_.data();
  call.num_tensors = static_cast<std::int64_t>(tensors_.size());
  call.rows = rows_.data();
  call.num_rows = static_cast<int>(rows_.size());
  call.num_scopes = static_cast<int>(scope_scales_.size());
  call.scope_scale = scope_scales_.data();
  call.joint = policy_.clip_scope == ClipScope::all;
  call.measure_norm = measures_norm();
  call.skip_nonfinite = judges();
  call.skip_norm = skips_ ? -1.0 : policy_.skip_norm;  // no norm is at most -1
  call.sums = sums;
  call.given_norms = given_ && !given_->is_on_device() ? &given_->value : nullptr;
  return call;
}

StepReport Call::run(const Speller& spell, StepCall::Sums sums) {
  norms_.assign(scope_scales_.size(), 0.0);
  tensor_norms_.assign(tensors_.size(), 0.0);
  clip_coefs_.assign(rows_.size(), 1.0);
  StepReport report;
  report.skipped = skips_;
  if (skips_ && !knows_norm()) return report;

  StepCall call = describe(sums);
  call.num_threads = cpu::get_num_threads();
  StepOutcome outcome{};
  outcome.norms = norms_.data();
  outcome.tensor_norms = tensor_norms_.data();
  outcome.clip_coefs = clip_coefs_.data();
  if (call.measure_norm && !given_) {
    report.tensor_norms = py::array_t<double>(static_cast<py::ssize_t>(leaves_));
  }
  run_kernels([&] { cpu::step(call, outcome); });
  if (policy_.on_nonfinite == OnNonfinite::raise && outcome.nonfinite) {
    raise_nonfinite(outcome.first_nonfinite, spell);
  }
  if (knows_norm()) report.grad_norm = outcome.norm;
  report.skipped = outcome.skipped;
  fill(report);
  return report;
}

void Call::raise_nonfinite(std::int64_t first, const Speller& spell) const {
  const std::string what =
      first < 0 ? "grad_norm is not finite"
                : spell(tensor_leaves_[static_cast<std::size_t>(first)], Role::grad, 0) +
                      " holds inf or NaN";
  PyErr_SetString(PyExc_FloatingPointError, (what + "; nothing was changed").c_str());
  throw py::error_already_set();
}

void Call::fill(StepReport& report) const {
  for (const Tensor& tensor : tensors_) {
    report.clip_coef = smaller_coefficient(report.clip_coef, clip_coefs_[tensor.row]);
  }
  if (report.tensor_norms.is_none()) return;
  auto norms = py::reinterpret_borrow<py::array_t<double>>(report.tensor_norms);
  std::fill_n(norms.mutable_data(), norms.size(), 0.0);
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    norms.mutable_data()[tensor_leaves_[t]] = tensor_norms_[t];
  }
}

void Call::tell_producers() {
  for (const Written& written : written_) {
    if (written.objects.empty()) continue;
    py::list objects(written.objects.size());
    for (std::size_t k = 0; k < written.objects.size(); ++k) {
      objects[k] = py::handle(written.objects[k]);
    }
    py::handle(written.producer->after_write)(objects);
  }
}

double Call::sum_squares() {
  const int threads = cpu::get_num_threads();
  const auto count = static_cast<std::int64_t>(tensors_.size());
  double sum = 0.0;
  run_kernels([&] { sum = cpu::sum_squares(tensors_.data(), count, threads); });
  return sum;
}

}  // namespace fusedstep::bindings
