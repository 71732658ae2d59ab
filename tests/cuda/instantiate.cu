// Every rule as CUDA would instantiate it, from the same headers as the CPU: one kernel that
// prepares the coefficients of a row in double, and one per arithmetic type that updates elements.
// tests/test_cuda_source.py compiles this and reads the PTX. Nothing launches these kernels: they
// show that the formulas compile unchanged, and to which instructions.

#include <cstdint>

#include "core/float16.hpp"
#include "core/gradient.hpp"
#include "core/norm_tree.hpp"
#include "core/step.hpp"
#include "rules/rules.hpp"

namespace fusedstep::cuda {

/// What thread 0 of one block computes for all blocks.
struct RowConstants {
  Conditioning<double> conditioning;
  double coefficients[max_coefficients];
  double clip_coefficient, product;
};

template <class Rule>
__global__ void prepare(const Row* row, const double* norm, RowConstants* constants) {
  if (threadIdx.x != 0) return;
  constants->conditioning = prepare_gradient(*row, *norm);
  constants->clip_coefficient = clip_coefficient(row->clip_norm, *norm);
  const auto hyper = hyper_of<Rule>(*row);
  Rule::prepare(hyper, row->progress, constants->coefficients);
  constants->product = product_after<Rule>(hyper, row->progress);
}

/// The buffers of one update; all in the arithmetic type.
template <class T>
struct Buffers {
  T* param;
  const T* grad;
  T* slots[max_slots];
};

template <class Rule, class T>
__global__ void apply(const RowConstants* constants, Buffers<T> at, std::int64_t count) {
  const Conditioning<double>& c = constants->conditioning;
  const Conditioning<T> conditioning{static_cast<T>(c.scale), static_cast<T>(c.limit), c.scales,
                                     c.limits};
  const double* known = constants->coefficients;
  const typename Rule::template Coefficients<T> coefficients(known);
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  T param = at.param[i], slots[max_slots];
#pragma unroll
  for (int s = 0; s < num_slots<Rule>; ++s) slots[s] = at.slots[s][i];
  Rule::apply(coefficients, param, condition(conditioning, at.grad[i]), slots);
  at.param[i] = param;
#pragma unroll
  for (int s = 0; s < num_slots<Rule>; ++s) at.slots[s][i] = slots[s];
}

/// The conversions of 16-bit buffers, and a level of the norm tree.
__global__ void convert(f16* half, bf16* brain, const float* x) {
  half[threadIdx.x] = to_f16(x[threadIdx.x] + to_float(half[threadIdx.x]));
  brain[threadIdx.x] = to_bf16(x[threadIdx.x] + to_float(brain[threadIdx.x]));
}
__global__ void fold_lanes(double* lanes, bool* again) {
  const double sum = norm_tree::fold<norm_tree::lanes>(lanes);
  *again = norm_tree::needs_second_look(sum);
}

/// Naming a kernel instantiates it.
template <class... All>
void instantiate(RuleList<All...> /*rules*/, const void** out) {
  const void* const kernels[] = {reinterpret_cast<const void*>(prepare<All>)...,
                                 reinterpret_cast<const void*>(apply<All, float>)...,
                                 reinterpret_cast<const void*>(apply<All, double>)...};
  for (const void* kernel : kernels) *out++ = kernel;
}

void instantiate_all(const void** out) { instantiate(Rules{}, out); }

}  // namespace fusedstep::cuda
