#pragma once
#include <cuda_runtime.h>

#include "cuda/table.hpp"

namespace fusedstep::cuda {

/// The table of a step, wherever its parts are.
__device__ __forceinline__ Table table_of(const Arguments& arguments) {
  Table table = arguments.step.table;
#pragma unroll
  for (int k = 0; k < Table::num_parts; ++k)
    if (!table.parts[k]) table.parts[k] = arguments.tables + arguments.step.places[k];
  return table;
}

}  // namespace fusedstep::cuda
