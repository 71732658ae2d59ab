#pragma once
#include <cstdint>

#include "core/hd.hpp"
#include "core/types.hpp"

/// The fixed tree of the gradient norm: the same additions in the same order on every instruction
/// set, device and number of threads.
///
/// Elements are converted to double (exactly) and squared; a float64 square is rounded before it is
/// added, never fused. A chunk is 16 tiles, a tile is 32 rows of 32 lanes: every lane adds its rows
/// in order, then lanes, and at last the tile sums, are folded by halving. All chunk sums of a list
/// of tensors are summed by groups of 1024, each like a tile, until one is left. What is missing at
/// an end counts as +0, so it is skipped.
namespace fusedstep::norm_tree {

constexpr int lanes = 32;
constexpr int rows = 32;
constexpr int tile_size = lanes * rows;
constexpr int tiles = 16;
static_assert(tiles * tile_size == chunk_size);

/// Sums `n` values (a power of two) by halving, in place.
template <int n>
FUSEDSTEP_HD double fold(double* values) {
  for (int half = n / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  return values[0];
}

/// Sum of a subtree of `n` > 0 chunk sums, whose children hold `span` of them each.
inline double sum_subtree(const double* sums, std::int64_t n, std::int64_t span) {
  if (span == 0) return sums[0];
  double lane[lanes] = {};
  for (std::int64_t begin = 0, child = 0; begin < n; begin += span, ++child) {
    const std::int64_t left = n - begin;
    lane[child % lanes] += sum_subtree(sums + begin, left < span ? left : span, span / tile_size);
  }
  return fold<lanes>(lane);
}

/// Sum of all chunk sums of a list of tensors; 0 if there are none.
inline double sum_chunks(const double* sums, std::int64_t n) {
  if (n == 1) return sums[0];
  std::int64_t span = 1;
  while (span * tile_size < n) span *= tile_size;
  return n == 0 ? 0.0 : sum_subtree(sums, n, span);
}

/// Squares of float64 gradients can leave the range of float64. If a sum S over float64 gradients
/// did, or came close, a second look sums the squares of x * 2^-e and the norm is
/// 2^e * sqrt(that sum), with e the exponent of max|x|. (All other types are safe.)
FUSEDSTEP_HD bool needs_second_look(double sum) {
  return sum == sum && !(sum >= 0x1p-900 && sum < HUGE_VAL);
}
FUSEDSTEP_HD int second_look_exponent(double max_abs) {
  const int exponent = ::ilogb(max_abs);
  return exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
}

}  // namespace fusedstep::norm_tree
