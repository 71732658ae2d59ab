#pragma once
#include <cstdint>

/// The streams of one optimizer step, and as little arithmetic as keeps a compiler from removing
/// them. Values stay finite and normal for any number of passes.
namespace fusedstep::roofline {

struct Streams {
  void* param;
  const void* grad;
  void* velocity;
  void* second;  ///< another state
};

/// One pass over the elements [begin, end). Only `read` returns something: a sum.
using Loop = float (*)(const Streams& at, std::int64_t begin, std::int64_t end);

struct Loops {
  Loop read;         ///< loads g                              4 B per element (float32)
  Loop sgd;          ///< loads p, g; stores p                12 B
  Loop update;       ///< loads p, g, v; stores p, v          20 B
  Loop moments;      ///< loads p, g and two states; stores p and these  28 B
  Loop update_bf16;  ///< the same, p and g of 16 bits        14 B
};

extern const Loops loops_scalar, loops_avx2, loops_avx512;

}  // namespace fusedstep::roofline
