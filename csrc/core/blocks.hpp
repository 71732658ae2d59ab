#pragma once
#include <cstdint>

#include "core/hd.hpp"

/// States stored as int8_blocks: x = code * scale, one scale for `block_size` codes.
namespace fusedstep {

/// A block with infinity or NaN becomes all NaN. `largest`: max|x|, NaN if any x is.
FUSEDSTEP_HD float scale_of_block(float largest) {
  return largest < HUGE_VALF ? largest / 127.0f : NAN;
}

/// x / scale to nearest even. The limit matters only where the scale is subnormal, and so not
/// precise.
FUSEDSTEP_HD std::int8_t encoded(float x, float scale) {
  const float code = scale > 0.0f ? clamp(x / scale, 127.0f) : 0.0f;
  return static_cast<std::int8_t>(::lrintf(code));
}

FUSEDSTEP_HD float decoded(std::int8_t code, float scale) {
  return static_cast<float>(code) * scale;
}

}  // namespace fusedstep
