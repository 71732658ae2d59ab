#pragma once
#include "cuda/table.hpp"

/// How a chunk is cut into vectors. Where its address is no multiple of a vector's size, the first
/// vector begins before it, and only the rest of that vector is accessed. Every chunk of a tensor
/// starts at the same place within a vector, as chunks are multiples of vectors.
namespace fusedstep::cuda {

/// One buffer, for the choice of a shift.
struct Address {
  std::uintptr_t data;
  std::size_t size;  ///< of an element
};

/// Whether vectors begin at multiples of their size, which is a power of two, if the first begins
/// `shift` elements before `data`.
FUSEDSTEP_HD bool is_aligned(const Address& at, int shift, int vector) {
  const auto before = static_cast<std::uintptr_t>(shift) * at.size;
  return ((at.data - before) & (static_cast<std::uintptr_t>(vector) * at.size - 1)) == 0;
}

/// The shift, shorter than a vector, with which most bytes of a step are in aligned vectors; the
/// least of those that are as good.
inline int best_shift(const Address* buffers, int count, int vector) {
  int best = 0;
  std::size_t most = 0;
  for (int shift = 0; shift < vector; ++shift) {
    std::size_t bytes = 0;
    for (const Address* b = buffers; b != buffers + count; ++b)
      if (is_aligned(*b, shift, vector)) bytes += b->size;
    if (bytes > most) {
      most = bytes;
      best = shift;
    }
  }
  return best;
}

}  // namespace fusedstep::cuda
