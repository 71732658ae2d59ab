#pragma once
#include <cuda_runtime.h>

#include "cuda/table.hpp"

namespace fusedstep::cuda {

/// The table of a step, wherever its parts are.
__device__ __forceinline__ Table table_of(const Arguments& arguments) {
  Table table = arguments.step.table;
  if (!table.rows) table.rows = arguments.tables;
  if (!table.grads) table.grads = arguments.tables + arguments.step.grads_inline;
  if (!table.slow) table.slow = arguments.tables + arguments.step.slow_inline;
  return table;
}

}  // namespace fusedstep::cuda
