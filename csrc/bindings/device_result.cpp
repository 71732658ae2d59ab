#include "bindings/device_result.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <utility>

namespace fusedstep::bindings {

namespace {

constexpr std::size_t num_fields = 5;
constexpr const char* field_names[num_fields] = {"grad_norm", "clip_coef", "skipped", "state",
                                                 "grad_norms"};
constexpr const char* description =
    R"(What a step on a device did.

The step has only been put into a stream. An attribute that the host cannot know yet waits for it
when it is read, without the GIL; what nobody reads costs nothing. It also is a tuple of the first
five attributes, like `StepResult`.

Attributes:
    grad_norm (float | None): L2 norm of all gradients of the call, after rescale_grad and before
        any clipping, accumulated in float64; None if nothing asked for it.
    clip_coef (float): the factor of the norm clip, min(1, grad_clip_norm / grad_norm); the smallest
        one if groups or arrays are clipped differently.
    skipped (bool): True if the step left everything as it was.
    state (dict): splat it into the next functional call; {} from an optimizer object. Waits only
        if the step may have been skipped and it matters for what stands in it.
    grad_norms (numpy.ndarray | None): float64, the norm of each array's gradient in the order of
        the arrays, after rescale_grad, 0 where there is none; None if nothing asked for a norm, or
        the norm was given.
    settled (bool): True once nothing has to be waited for. The result of a step that was captured
        into a CUDA graph never settles: it tells of the last replay, and has nothing to tell before
        the first.

Raises:
    RuntimeError: From an attribute that is read while the stream of the step is being captured, or
        before the first replay of a captured step, or if the device has failed.
)";

class DeviceStepResult {
 public:
  DeviceStepResult(Launched launched, py::dict applied, py::dict skipped)
      : launched_(std::move(launched)),
        applied_(std::move(applied)),
        skipped_(std::move(skipped)) {}

  py::object grad_norm() {
    return launched_.has_norm ? py::object(py::float_(read().norm)) : py::none();
  }
  double clip_coef() { return launched_.may_clip && launched_.has_norm ? read().clip_coef : 1.0; }
  bool skipped() { return launched_.may_skip && read().skipped; }
  py::dict state() {
    const bool same = applied_.is(skipped_);
    return same || !skipped() ? applied_ : skipped_;
  }
  py::object grad_norms() {
    if (!launched_.has_tensor_norms) return py::none();
    read(true);
    return norms_;
  }
  bool settled() const {
    const bool unknown = launched_.has_norm || launched_.may_skip;
    return !launched_.report || known_ || (!unknown && !launched_.captured);
  }

  void settle() { read(); }

  py::tuple as_tuple() {
    if (launched_.has_tensor_norms) read(true);
    return py::make_tuple(grad_norm(), clip_coef(), skipped(), state(), grad_norms());
  }

 private:
  /// The norms of tensors take more copies: only for who asks for them. Two threads may wait at
  /// once: both find the same.
  const DeviceReport& read(bool with_norms = false) {
    if (!launched_.report || (with_norms ? knows_norms_ : known_)) return report_;
    std::vector<double> tensor_norms(with_norms ? launched_.tensor_leaves.size() : 0);
    const DeviceReport report =
        launched_.report->read(reading_stream(), with_norms ? tensor_norms.data() : nullptr);
    if (launched_.captured && is_untouched(report)) {
      throw std::runtime_error(
          "the step was captured into a CUDA graph that has not been replayed yet");
    }
    if (with_norms && !knows_norms_) norms_ = spread(tensor_norms);
    if (!known_) report_ = report;
    known_ = !launched_.captured;
    knows_norms_ = known_ && (knows_norms_ || with_norms);
    if (known_ && (knows_norms_ || !launched_.has_tensor_norms)) {
      launched_.stream.owner = py::object();
    }
    return report_;
  }

  /// A graph is replayed wherever its library works then.
  Stream reading_stream() const {
    if (!launched_.captured) return launched_.stream;
    PyObject* const array = launched_.array.ptr();
    bool known = false;
    return current_stream(array, producer_of(array), launched_.report->gpu().id, &known);
  }

  /// As a new report is: no step says that nothing is not finite and that it is the first array.
  static bool is_untouched(const DeviceReport& report) {
    return !report.nonfinite && report.first_nonfinite == 0;
  }

  /// By leaves; those without a gradient have none.
  py::object spread(const std::vector<double>& tensor_norms) const {
    py::array_t<double> norms(static_cast<py::ssize_t>(launched_.leaves));
    std::fill_n(norms.mutable_data(), norms.size(), 0.0);
    for (std::size_t t = 0; t < tensor_norms.size(); ++t) {
      norms.mutable_data()[launched_.tensor_leaves[t]] = tensor_norms[t];
    }
    return std::move(norms);
  }

  Launched launched_;
  py::dict applied_, skipped_;
  bool known_ = false, knows_norms_ = false;
  DeviceReport report_{0.0, 0.0, 1.0, -1, true, false};  ///< of a step that was not even launched
  py::object norms_ = py::none();
};

py::object item(DeviceStepResult& self, py::handle index) {
  return py::object(self.as_tuple())[index];
}

std::string repr(DeviceStepResult& self) {
  const py::tuple values = self.as_tuple();
  std::string text = "fusedstep.DeviceStepResult(";
  for (std::size_t k = 0; k < num_fields; ++k) {
    text += (k > 0 ? ", " : "") + std::string(field_names[k]) + "=" +
            static_cast<std::string>(py::repr(values[k]));
  }
  return text + ")";
}

}  // namespace

void bind_device_result(py::module_& module) {
  py::class_<DeviceStepResult> type(module, "DeviceStepResult", description);
  type.def_property_readonly("grad_norm", &DeviceStepResult::grad_norm)
      .def_property_readonly("clip_coef", &DeviceStepResult::clip_coef)
      .def_property_readonly("skipped", &DeviceStepResult::skipped)
      .def_property_readonly("state", &DeviceStepResult::state)
      .def_property_readonly("grad_norms", &DeviceStepResult::grad_norms)
      .def_property_readonly("settled", &DeviceStepResult::settled)
      .def("__len__", [](const DeviceStepResult&) { return num_fields; })
      .def("__iter__", [](DeviceStepResult& self) { return py::iter(self.as_tuple()); })
      .def("__getitem__", &item)
      .def("__repr__", &repr);
  type.attr("__module__") = "fusedstep";
  type.attr("__match_args__") =
      py::make_tuple("grad_norm", "clip_coef", "skipped", "state", "grad_norms");
}

py::object make_device_result(Launched launched, py::dict applied, py::dict skipped, bool settled) {
  auto result = std::make_unique<DeviceStepResult>(std::move(launched), std::move(applied),
                                                   std::move(skipped));
  if (settled) result->settle();
  return py::cast(result.release(), py::return_value_policy::take_ownership);
}

}  // namespace fusedstep::bindings
