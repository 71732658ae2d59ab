#pragma once
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "buffers.hpp"
#include "core/step.hpp"
#include "cpu/isa.hpp"
#include "cpu/step.hpp"

/// What the checks have in common: counting, and calls of the step engine.
namespace checks {

using namespace fusedstep;
using namespace buffers;

inline long passed = 0, failed = 0;

inline bool check(bool right, const std::string& what) {
  ++(right ? passed : failed);
  if (!right && failed <= 50) std::printf("FAILED: %s\n", what.c_str());
  return right;
}

/// Prints the result; the exit status of main.
inline int report() {
  std::printf("%ld passed, %ld failed\n", passed, failed);
  return failed > 0;
}

/// A call in the making, with one row and one scope unless told otherwise.
struct Call {
  std::vector<Tensor> tensors;
  std::vector<Row> rows{Row{}};
  std::vector<double> scales{1.0}, norms, tensor_norms, clips;
  StepCall call{};
  StepOutcome outcome{};
  bool wants_tensor_norms = true;

  explicit Call(std::vector<Tensor> all) : tensors(std::move(all)) {
    rows[0].coefficients_given = true;
    rows[0].rescale_grad = rows[0].sign = 1.0;
    rows[0].clip_norm = rows[0].clip_value = HUGE_VAL;
    call.joint = true;
    call.num_threads = 1;
  }
  void run() {
    call.tensors = tensors.data();
    call.num_tensors = static_cast<std::int64_t>(tensors.size());
    call.rows = rows.data();
    call.num_rows = static_cast<int>(rows.size());
    call.num_scopes = static_cast<int>(scales.size());
    call.scope_scale = scales.data();
    norms.assign(scales.size(), -1.0);
    tensor_norms.assign(tensors.size(), -1.0);
    clips.assign(rows.size(), -1.0);
    outcome = {norms.data(),
               wants_tensor_norms ? tensor_norms.data() : nullptr,
               clips.data(),
               -1.0,
               true,
               true,
               -2};
    cpu::step(call, outcome);
  }
};

inline void for_each_isa(const std::function<void(const std::string&)>& body) {
  for (const std::string& isa : cpu::available_isas()) {
    cpu::force_isa(isa);
    check(cpu::active_isa() == isa, "force_isa " + isa);
    body(isa);
  }
  cpu::force_isa("");
}

/// Of magnitudes so different that every order of additions gives other bits, 16-bit types too.
inline Buffers gradients(DType dtype, const std::vector<std::int64_t>& sizes,
                         double magnitude = 1.0) {
  Buffers all = make({dtype == f64 ? f64 : f32, dtype, f32}, sizes, 0);
  for (TensorBuffers& one : all) {
    one.grad.fill(magnitude);
    for (std::int64_t i = 0; i < one.grad.numel(); ++i) {
      const double x = oracle::get(dtype, one.grad.data(), i);
      oracle::put(dtype, one.grad.data(), i,
                  std::ldexp(x, static_cast<int>(generator() % 25) - 12));
    }
  }
  return all;
}

}  // namespace checks
