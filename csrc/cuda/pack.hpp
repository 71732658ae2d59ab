#pragma once
#include <vector>

#include "cuda/table.hpp"

/// From a call to the records that the kernels read.
namespace fusedstep::cuda {

/// The parts of a table, as whole words, and what else the engine has to know.
struct Packed {
  std::vector<std::uint64_t> rows, grads, slow;
  std::vector<std::uint32_t> chunks;  ///< first one of each tensor, and their number
  Table table{};                      ///< without addresses
  bool wide = false;                  ///< a gradient is summed as float64
  int rule = -1;                      ///< of all rows; -1: there are several
  Access access = Access::any;        ///< which kernel can do it

  std::uint32_t num_chunks() const { return chunks.back(); }
};

/// Throws std::length_error if there are more chunks than a grid can have blocks.
void pack(const DeviceCall& call, Packed& out);

}  // namespace fusedstep::cuda
