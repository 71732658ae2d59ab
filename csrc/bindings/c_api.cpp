#include "bindings/c_api.hpp"

#include <exception>
#include <string>

#include "core/c_api.hpp"
#include "cpu/rule_info.hpp"
#include "cpu/step.hpp"
#include "cpu/threads.hpp"

namespace fusedstep::bindings {

namespace py = pybind11;

namespace {

/// No exception may cross from module to module: each has a C++ runtime of its own choice.
template <class Run>
const char* why_not(Run run) noexcept {
  thread_local std::string text;
  try {
    run();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

const char* step(const StepCall* call, StepOutcome* outcome) {
  return why_not([&] { cpu::step(*call, *outcome); });
}

double join_norms(const double* norms, std::int64_t count) { return cpu::join_norms(norms, count); }

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
