#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/threads.hpp"
#include "loops.hpp"

namespace fusedstep::roofline {
namespace {

constexpr std::int64_t piece = 65536;  ///< elements claimed at once
constexpr int most_threads = 64;

/// A worker's part of the elements: contiguous, walked in order, so that the hardware prefetches.
struct alignas(128) Part {
  std::atomic<std::int64_t> next;
  std::int64_t end;
};

struct Pass {
  Loop loop;
  Streams at;
  int threads;
  Part parts[most_threads];
  std::atomic<float> sum{0};
};

/// Own part first, then what the others have left: a late thread must not spoil the roofline.
void work(void* context, int worker) {
  Pass& pass = *static_cast<Pass*>(context);
  float sum = 0;
  for (int k = 0; k < pass.threads; ++k) {
    Part& part = pass.parts[(worker + k) % pass.threads];
    for (;;) {
      const std::int64_t begin = part.next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= part.end) break;
      sum += pass.loop(pass.at, begin, std::min(begin + piece, part.end));
    }
  }
  pass.sum.store(sum, std::memory_order_relaxed);
}

const Loops* find_loops(const char* isa) {
  if (std::strcmp(isa, "scalar") == 0) return &loops_scalar;
#if defined(FUSEDSTEP_X86)
  if (std::strcmp(isa, "avx2") == 0) return &loops_avx2;
  if (std::strcmp(isa, "avx512") == 0) return &loops_avx512;
#endif
  return nullptr;
}

Loop find_loop(const Loops& loops, const char* name) {
  if (std::strcmp(name, "read") == 0) return loops.read;
  if (std::strcmp(name, "sgd") == 0) return loops.sgd;
  if (std::strcmp(name, "update") == 0) return loops.update;
  if (std::strcmp(name, "moments") == 0) return loops.moments;
  if (std::strcmp(name, "update_bf16") == 0) return loops.update_bf16;
  return nullptr;
}

}  // namespace
}  // namespace fusedstep::roofline

/// Runs a loop once over `numel` elements on `threads` threads. Returns 0, or -1 if there is no
/// such loop or instruction set. Called from Python by ctypes.
extern "C" __attribute__((visibility("default"))) int fusedstep_roofline(
    const char* isa, const char* name, void* param, const void* grad, void* velocity, void* second,
    std::int64_t numel, int threads) {
  using namespace fusedstep::roofline;
  const Loops* loops = find_loops(isa);
  const Loop loop = loops ? find_loop(*loops, name) : nullptr;
  if (!loop) return -1;
  Pass pass{loop, {param, grad, velocity, second}, std::clamp(threads, 1, most_threads), {}, {}};
  const std::int64_t pieces = (numel + piece - 1) / piece;
  for (int k = 0; k < pass.threads; ++k) {
    pass.parts[k].next = std::min(numel, pieces * k / pass.threads * piece);
    pass.parts[k].end = std::min(numel, pieces * (k + 1) / pass.threads * piece);
  }
  fusedstep::cpu::run_region(pass.threads, work, &pass);
  return 0;
}
