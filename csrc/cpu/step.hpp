#pragma once
#include "core/step.hpp"

namespace fusedstep::cpu {

/// Executes one step on the CPU: norm, clip coefficients, update, in one parallel region over one
/// flat chunk list. Never fails on valid calls but for memory (std::bad_alloc, before any write).
/// Safe to call from several threads at once on disjoint tensors.
void step(const StepCall& call, StepOutcome& outcome);

/// The norm of several parts together, from theirs: sqrt(sum norm^2), which does not overflow.
double join_norms(const double* norms, std::int64_t count);

/// Sum of the squares of all gradients, in float64 over the fixed tree; uses only the grad fields,
/// `numel` and `param_dtype` (the arithmetic type of staged gradients). Tensors with `chunk_sums`
/// get those of their chunks.
double sum_squares(const Tensor* tensors, std::int64_t num_tensors, int num_threads);

}  // namespace fusedstep::cpu
