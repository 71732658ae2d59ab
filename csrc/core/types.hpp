#pragma once
#include <cstddef>
#include <cstdint>

#include "core/hd.hpp"

namespace fusedstep {

/// IEEE binary16 and bfloat16 as stored; arithmetic on them is always float32.
struct f16 {
  std::uint16_t bits;
};
struct bf16 {
  std::uint16_t bits;
};

/// How the elements of a buffer are stored. `int8_blocks` is a state that is not stored element by
/// element: int8 codes plus one float32 scale per `block_size` elements in the slot's `aux` buffer.
enum class DType : std::uint8_t { float32, float64, float16, bfloat16, int8_blocks };

FUSEDSTEP_HD constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return 8;
    case DType::float32: return 4;
    case DType::int8_blocks: return 1;
    default: return 2;
  }
}

FUSEDSTEP_HD constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return "float64";
    case DType::float32: return "float32";
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
    default: return "int8_blocks";
  }
}

/// A unit of work: at most this many elements of one tensor, in memory order (docs: norm tree).
constexpr std::int64_t chunk_size = 16384;
/// Elements that share one scale in a block-wise stored state; divides `chunk_size`.
constexpr std::int64_t block_size = 256;
constexpr int max_slots = 3;          ///< state buffers of one rule
constexpr int max_hypers = 16;        ///< hyper-parameters of one rule
constexpr int max_coefficients = 16;  ///< what `prepare` makes of them

constexpr int max_scalars = 2;  ///< what `Progress` can hold for a rule

/// How far the tensors of a row have come. A rule names in `scalars` what of it its formula reads:
/// nothing, {"step"}, or {"step", <its product>}.
struct Progress {
  std::int64_t step;     ///< 1-based count of the step being taken
  bool first;            ///< the state has not seen a step yet
  double product = 1.0;  ///< of the factors `Rule::factor` of all steps before
};

/// A compile-time list of rules: `rules/rules.hpp` holds the only one.
template <class... Rules>
struct RuleList {
  static constexpr int size = static_cast<int>(sizeof...(Rules));
};

/// Elements of an array type, 0 for any other type.
template <class T>
constexpr int length_of = 0;
template <class T, std::size_t n>
constexpr int length_of<T[n]> = static_cast<int>(n);

/// State buffers that a rule has. (`slots` is a null pointer in a rule without.)
template <class Rule>
constexpr int num_slots = length_of<decltype(Rule::slots)>;

/// The running product after a step, of a rule that has one.
template <class Rule, class Hyper>
FUSEDSTEP_HD double product_after(const Hyper& hyper, const Progress& at) {
  if constexpr (length_of<decltype(Rule::scalars)> == max_scalars) {
    return at.product * Rule::factor(hyper, at.step);
  } else {
    return at.product;
  }
}

}  // namespace fusedstep
