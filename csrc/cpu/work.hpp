#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "core/step.hpp"

/// How a step is cut into chunks and how threads share them out.
namespace fusedstep::cpu {

/// Up to chunk_size elements of one tensor.
struct Chunk {
  std::int64_t begin;
  std::uint32_t tensor, count;
};

inline void append_chunks(std::uint32_t tensor, std::int64_t numel, std::vector<Chunk>& chunks) {
  for (std::int64_t begin = 0; begin < numel; begin += chunk_size) {
    const std::int64_t count = std::min(chunk_size, numel - begin);
    chunks.push_back({begin, tensor, static_cast<std::uint32_t>(count)});
  }
}

/// Chunk indices [first, last).
struct ChunkRange {
  std::uint32_t first, last;
};

/// What is left of a thread's chunks. The owner takes from the front, so that it reads one long run
/// of memory; others take from the back, far away from it.
class alignas(64) Share {
 public:
  void set(ChunkRange range) { range_.store(pack(range), std::memory_order_relaxed); }

  /// Takes up to `most` chunks; an empty range if none are left. (Relaxed: who takes a chunk finds
  /// everything that it reads published by the start of the stage.)
  ChunkRange take(bool from_front, std::uint32_t most) {
    std::uint64_t packed = range_.load(std::memory_order_relaxed);
    for (;;) {
      const ChunkRange left = unpack(packed);
      if (left.first >= left.last) return {0, 0};
      const std::uint32_t n = std::min(most, left.last - left.first);
      const std::uint32_t cut = from_front ? left.first + n : left.last - n;
      const ChunkRange front{left.first, cut}, back{cut, left.last};
      const std::uint64_t rest = pack(from_front ? back : front);
      if (range_.compare_exchange_weak(packed, rest, std::memory_order_relaxed))
        return from_front ? front : back;
    }
  }

 private:
  static std::uint64_t pack(ChunkRange range) {
    return std::uint64_t{range.last} << 32 | range.first;
  }
  static ChunkRange unpack(std::uint64_t packed) {
    return {static_cast<std::uint32_t>(packed), static_cast<std::uint32_t>(packed >> 32)};
  }
  std::atomic<std::uint64_t> range_{0};
};

/// Deals out contiguous ranges of chunks with about the same number of elements each.
inline void deal(const std::vector<Chunk>& chunks, std::int64_t elements, Share* shares,
                 int threads) {
  std::uint32_t first = 0, last = 0;
  std::int64_t before = 0;  // elements of chunks [0, last)
  for (int t = 0; t < threads; ++t, first = last) {
    const std::int64_t goal = elements / threads * (t + 1) + elements % threads * (t + 1) / threads;
    while (last < chunks.size() && before < goal) before += chunks[last++].count;
    shares[t].set({first, last});
  }
}

/// Takes chunks for thread `self` until none are left anywhere, from its own share first, and calls
/// visit(index) for each. Returns how many it took. Chunks that others took may still be in work.
template <class Visit>
std::int64_t visit_shares(Share* shares, int threads, int self, std::uint32_t batch, Visit visit) {
  std::int64_t visited = 0;
  for (int other = 0; other < threads; ++other) {
    Share& share = shares[(self + other) % threads];
    for (;;) {
      const ChunkRange taken = share.take(other == 0, batch);
      if (taken.first == taken.last) break;
      for (std::uint32_t i = taken.first; i < taken.last; ++i) visit(i);
      visited += taken.last - taken.first;
    }
  }
  return visited;
}

}  // namespace fusedstep::cpu
