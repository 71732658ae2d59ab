// A call that runs on a device.
#include <algorithm>
#include <limits>

#include "bindings/call.hpp"

namespace fusedstep::bindings {

void Call::set_cells(std::uint32_t row, const RowCells& cells) {
  device_rows_[row].from = cells.from;
  device_rows_[row].to = cells.to;
}

void Call::set_numbers(std::uint32_t row, const DeviceNumber& step, const DeviceNumber& product,
                       bool advances) {
  if (device_rows_.size() < rows_.size()) device_rows_.resize(rows_.size());
  device_rows_[row].step = step;
  device_rows_[row].product = product;
  device_rows_[row].advances = advances;
}

DeviceNumber Call::add_number(PyObject* object, const Place& place, int index) {
  const Buffer buffer = import_one(object, place, true, owners_, &stream_);
  if (buffer.readonly) fail(PyExc_BufferError, place, " is read-only; it is advanced in place");
  if (buffer.device != device_) {
    fail(PyExc_ValueError, place,
         " is on " + buffer.device.spell() + ", but params are on " + device_.spell());
  }
  if (device_.is_cpu()) fail(PyExc_TypeError, place, ": an array of it works on a device only");
  const bool real = buffer.scalar == Scalar::float32 || buffer.scalar == Scalar::float64;
  const bool whole = buffer.scalar == Scalar::int32 || buffer.scalar == Scalar::int64;
  if (!real && !(whole && index == 0)) {
    fail(PyExc_TypeError, place,
         std::string(": dtype ") + name_of(buffer.scalar) + " does not do; use float32" +
             (index == 0 ? ", float64, int32 or int64" : " or float64"));
  }
  add_span(buffer, 0, Role::scalar, index);
  note_write(object, *buffer.producer);
  return device_number(buffer, place);
}

bool Call::may_skip() const {
  const bool refuses = policy_.skip_norm != HUGE_VAL && knows_norm();
  return judges() || refuses || found_inf_.data != nullptr || skips_;
}

/// The rows made for single tensors advance with the one they were made of.
DeviceCall Call::describe_for_device(StepCall::Sums sums) {
  const std::size_t first = device_rows_.size() - row_origins_.size();
  for (std::size_t k = 0; k < row_origins_.size(); ++k) {
    const DeviceRow& origin = device_rows_[row_origins_[k]];
    device_rows_[first + k] = origin;
    device_rows_[first + k].advances = false;
  }
  DeviceCall call{};
  call.step = describe(sums);
  call.rows = device_rows_.data();
  call.scope_rows = scope_rows_.data();
  call.found_inf = found_inf_;
  call.grad_scale = grad_scale_;
  if (given_) call.given_norm = given_->device;
  call.stream = stream().handle;
  return call;
}

Launched Call::launch(Workspace& workspace, Counts* counts, StepCall::Sums sums) {
  Launched launched;
  launched.stream = stream();
  launched.captured = gpu_.is_capturing(stream());
  if (launched.captured) launched.array = stream_.array();
  launched.has_norm = knows_norm();
  launched.has_tensor_norms = measures_norm() && !given_;
  launched.may_skip = may_skip();
  launched.leaves = leaves_;
  launched.tensor_leaves = tensor_leaves_;
  for (const Tensor& tensor : tensors_) {
    launched.may_clip = launched.may_clip || rows_[tensor.row].clip_norm != HUGE_VAL;
  }
  if (skips_ && !knows_norm()) return launched;
  DeviceCall call = describe_for_device(sums);
  call.counts = counts;
  launched.report = std::make_unique<Report>(gpu_, workspace.step(call));
  return launched;
}

DeviceReport Call::wait(const Launched& launched, const Speller& spell) const {
  const DeviceReport report = launched.report->read(launched.stream, nullptr);
  if (policy_.on_nonfinite == OnNonfinite::raise && report.nonfinite) {
    raise_nonfinite(report.first_nonfinite, spell);
  }
  return report;
}

double Call::sum_squares(Workspace& workspace, bool wanted) {
  constexpr double scale = 1.0;
  constexpr std::uint32_t scope_row = 0;
  Row row{};
  row.rescale_grad = row.sign = 1.0;
  row.clip_norm = row.clip_value = HUGE_VAL;
  const DeviceRow device_row;
  DeviceCall call{};
  call.step.tensors = tensors_.data();
  call.step.num_tensors = static_cast<std::int64_t>(tensors_.size());
  call.step.rows = &row;
  call.step.num_rows = 1;
  call.step.num_scopes = 1;
  call.step.scope_scale = &scale;
  call.step.joint = true;
  call.step.measure_norm = true;
  call.rows = &device_row;
  call.scope_rows = &scope_row;
  call.only_sum = true;
  call.stream = stream().handle;
  if (wanted) refuse_capture(gpu_, stream(), "a sum of squares cannot be read");
  Report report(gpu_, workspace.step(call));
  return wanted ? report.read(stream(), nullptr).sum : 0.0;
}

}  // namespace fusedstep::bindings
