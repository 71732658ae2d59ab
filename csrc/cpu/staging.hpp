#pragma once
#include "core/step.hpp"

namespace fusedstep::cpu {

/// The arithmetic type of a parameter, which is also that of its staged gradients.
inline DType arithmetic_of(DType param) {
  return param == DType::float64 ? DType::float64 : DType::float32;
}

/// Gathers elements [begin, begin + count) of a gradient with a layout, in the parameter's memory
/// order, into `staging`: as the parameter's arithmetic type, rounded once.
void gather(const Tensor& tensor, std::int64_t begin, std::int64_t count, void* staging);

}  // namespace fusedstep::cpu
