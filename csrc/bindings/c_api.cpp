#include "bindings/c_api.hpp"

#include "core/c_api.hpp"
#include "core/why_not.hpp"
#include "cpu/rule_info.hpp"
#include "cpu/step.hpp"
#include "cpu/threads.hpp"

namespace fusedstep::bindings {

namespace py = pybind11;

namespace {

const char* step(const StepCall* call, StepOutcome* outcome) {
  return why_not([&] { cpu::step(*call, *outcome); });
}

double join_norms(const double* norms, std::int64_t count) { return cpu::join_norms(norms, count); }

int num_slots(std::int64_t rule) {
  const auto& rules = cpu::rule_infos();
  const bool known = rule >= 0 && rule < static_cast<std::int64_t>(rules.size());
  return known ? static_cast<int>(rules[static_cast<std::size_t>(rule)].slots.size()) : -1;
}

double product_after(const Row* row) { return cpu::product_after(*row); }

int num_threads(const char** error) {
  int threads = 0;
  *error = why_not([&] { threads = cpu::get_num_threads(); });
  return threads;
}

CApi table() {
  CApi api{};
  api.step = step;
  api.join_norms = join_norms;
  api.num_slots = num_slots;
  api.product_after = product_after;
  api.num_threads = num_threads;
  return api;
}

}  // namespace

void bind_c_api(py::module_& module) {
  static const CApi api = table();
  module.attr(CApi::attribute) = py::capsule(&api, CApi::capsule);
}

}  // namespace fusedstep::bindings
