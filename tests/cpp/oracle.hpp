#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "core/step.hpp"
#include "rules/rules.hpp"

/// What the kernels must compute, written a second time and as plainly as possible: one element
/// after the other, through values, not bits.
namespace oracle {

using namespace fusedstep;

// --- elements ---------------------------------------------------------------------------------

/// A value with `digits` bits of precision whose smallest positive one is 2^-tiny.
inline float round_to(float x, int digits, int tiny, float largest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int last = std::max(std::ilogb(x) - (digits - 1), -tiny);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(double{x}, -last)), last);
  if (std::fabs(rounded) > largest) return std::copysign(HUGE_VALF, x);
  return std::copysign(static_cast<float>(rounded), x);
}

inline double value_of_float16(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? NAN : HUGE_VAL)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline std::uint16_t bits_of_float16(float x) {
  const unsigned sign = std::signbit(x) ? 0x8000 : 0;
  const float rounded = std::fabs(round_to(x, 11, 24, 65504.0f));
  unsigned bits = 0;
  if (std::isnan(rounded)) {
    bits = 0x7e00;
  } else if (std::isinf(rounded)) {
    bits = 0x7c00;
  } else if (rounded != 0) {
    const int exponent = std::max(std::ilogb(rounded), -14);
    bits = static_cast<unsigned>((exponent + 14) * 1024 +
                                 std::lrint(std::ldexp(rounded, 10 - exponent)));
  }
  return static_cast<std::uint16_t>(sign | bits);
}

template <class T>
T at(const void* data, std::int64_t i) {
  T x;
  std::memcpy(&x, static_cast<const T*>(data) + i, sizeof x);
  return x;
}
template <class T>
void set(void* data, std::int64_t i, T x) {
  std::memcpy(static_cast<T*>(data) + i, &x, sizeof x);
}

inline double get(DType dtype, const void* data, std::int64_t i) {
  switch (dtype) {
    case DType::float64: return at<double>(data, i);
    case DType::float32: return at<float>(data, i);
    case DType::float16: return value_of_float16(at<std::uint16_t>(data, i));
    default: {
      const std::uint32_t bits = std::uint32_t{at<std::uint16_t>(data, i)} << 16;
      float x;
      std::memcpy(&x, &bits, sizeof x);
      return x;
    }
  }
}

inline void put(DType dtype, void* data, std::int64_t i, double x) {
  const auto narrow = static_cast<float>(x);
  switch (dtype) {
    case DType::float64: return set(data, i, x);
    case DType::float32: return set(data, i, narrow);
    case DType::float16: return set(data, i, bits_of_float16(narrow));
    default: {
      const float rounded = round_to(narrow, 8, 133, 0x1.fep127f);
      std::uint32_t bits;
      std::memcpy(&bits, &rounded, sizeof bits);
      set(data, i, static_cast<std::uint16_t>(std::isnan(rounded) ? 0x7fc0 : bits >> 16));
    }
  }
}

// --- rules: coefficients as given, terms with a zero coefficient left out ---------------------

template <class T>
T add_scaled(double a, T x, T y) {
  return a != 0 ? std::fma(static_cast<T>(a), x, y) : y;
}

template <class T>
T combine(double a, T x, double b, T y) {
  const T second = b != 0 ? static_cast<T>(b) * y : T(0);
  return a == 0 ? second : b == 0 ? static_cast<T>(a) * x : std::fma(static_cast<T>(a), x, second);
}

template <class T>
void apply(Sgd, const double* k, T& p, T g, T* /*slots*/) {
  g = add_scaled(k[0], p, g);
  p = add_scaled(k[1], g, add_scaled(-k[2], p, p));
}

template <class T>
void apply(Momentum, const double* k, T& p, T g, T* slots) {
  g = add_scaled(k[0], p, g);
  slots[0] = combine(k[2], g, k[1], slots[0]);
  const T d = combine(k[3], slots[0], k[4], g);
  p = add_scaled(k[5], d, add_scaled(-k[6], p, p));
}

/// beta*m + (1 - beta)*x from the end that is nearer: its weight is the one that is not zero.
template <class T>
T average(double c, double b, T x, T m) {
  if (c != 0) return std::fma(static_cast<T>(c), x - m, m);
  return b != 0 ? std::fma(static_cast<T>(b), m - x, x) : x;
}

/// The decay in g, then both averages; returns g. k: wd, c1, b1, c2, b2.
template <class T>
T update_moments(const double* k, T p, T g, T& m, T& s) {
  g = add_scaled(k[0], p, g);
  m = average(k[1], k[2], g, m);
  s = average(k[3], k[4], g * g, s);
  return g;
}

/// k: R, S, eps, D.
template <class T>
void descend(const double* k, T& p, T u, T s) {
  const T d = std::fma(static_cast<T>(k[0]), std::sqrt(s), static_cast<T>(k[2]));
  p = add_scaled(k[1], u / d, add_scaled(-k[3], p, p));
}

template <class T>
void apply(NAdam, const double* k, T& p, T g, T* slots) {
  g = update_moments(k, p, g, slots[0], slots[1]);
  descend(k + 7, p, combine(k[6], slots[0], k[5], g), slots[1]);
}

template <class T>
void apply(Adam, const double* k, T& p, T g, T* slots) {
  update_moments(k, p, g, slots[0], slots[1]);
  descend(k + 5, p, slots[0], slots[1]);
}

template <class T>
void apply(AdamAmsgrad, const double* k, T& p, T g, T* slots) {
  update_moments(k, p, g, slots[0], slots[1]);
  if (!(slots[2] > slots[1])) slots[2] = slots[1];
  descend(k + 5, p, slots[0], slots[2]);
}

/// With grad_avg `a` and momentum_buffer `v`, which a rule may not keep. k: wd, c, b, A, N1, N2, S,
/// eps, D, E.
template <class T>
void rmsprop(const double* k, T& p, T g, T& s, T* a, T* v) {
  g = add_scaled(k[0], p, g);
  s = average(k[1], k[2], g * g, s);
  T variance = s;
  if (a) {
    *a = average(k[1], k[2], g, *a);
    variance = std::fma(-*a, *a, s);
    if (variance < 0) variance = 0;
  }
  if (k[9] != 0) variance += static_cast<T>(k[9]);
  T u = g / (std::sqrt(variance) + static_cast<T>(k[7]));
  if (v) {
    *v = add_scaled(k[3], *v, u);
    u = combine(k[4], *v, k[5], u);
  }
  p = add_scaled(k[6], u, add_scaled(-k[8], p, p));
}

template <class T>
void apply(Rmsprop, const double* k, T& p, T g, T* slots) {
  rmsprop<T>(k, p, g, slots[0], nullptr, nullptr);
}
template <class T>
void apply(RmspropCentered, const double* k, T& p, T g, T* slots) {
  rmsprop<T>(k, p, g, slots[0], &slots[1], nullptr);
}
template <class T>
void apply(RmspropMomentum, const double* k, T& p, T g, T* slots) {
  rmsprop<T>(k, p, g, slots[0], nullptr, &slots[1]);
}
template <class T>
void apply(RmspropCenteredMomentum, const double* k, T& p, T g, T* slots) {
  rmsprop<T>(k, p, g, slots[0], &slots[1], &slots[2]);
}

template <class T>
void apply(Accumulate, const double* k, T& p, T g, T* /*slots*/) {
  p = combine(k[1], g, k[0], p);
}

// --- one tensor -------------------------------------------------------------------------------

/// int8 codes and scales of one block -> values, and back.
inline void decode_block(const Slot& slot, std::int64_t begin, std::int64_t count, float* values) {
  const float scale = at<float>(slot.aux, begin / block_size);
  for (std::int64_t i = 0; i < count; ++i)
    values[i] = static_cast<float>(at<std::int8_t>(slot.data, begin + i)) * scale;
}
inline void encode_block(const float* values, const Slot& slot, std::int64_t begin,
                         std::int64_t count) {
  float largest = 0;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(values[i]);
    largest = std::max(largest, std::fabs(values[i]));
  }
  const float scale = finite ? largest / 127 : std::numeric_limits<float>::quiet_NaN();
  set(slot.aux, begin / block_size, scale);
  for (std::int64_t i = 0; i < count; ++i) {
    const float code = finite && scale != 0 ? std::nearbyint(values[i] / scale) : 0.0f;
    set(slot.data, begin + i, static_cast<std::int8_t>(std::clamp(code, -127.0f, 127.0f)));
  }
}

template <class Rule, class T>
void update(const Tensor& tensor, const double* k, double scale, double limit) {
  float values[max_slots][block_size];  // of block-wise stored states
  for (std::int64_t begin = 0; begin < tensor.numel; begin += block_size) {
    const std::int64_t count = std::min(block_size, tensor.numel - begin);
    for (int s = 0; s < num_slots<Rule>; ++s)
      if (tensor.slots[s].dtype == DType::int8_blocks)
        decode_block(tensor.slots[s], begin, count, values[s]);
    for (std::int64_t i = begin; i < begin + count; ++i) {
      T p = static_cast<T>(get(tensor.param_dtype, tensor.param, i)), v[max_slots] = {};
      T g = static_cast<T>(scale) * static_cast<T>(get(tensor.grad_dtype, tensor.grad, i));
      const T high = static_cast<T>(limit);
      if (g > high) g = high;
      if (g < -high) g = -high;
      for (int s = 0; s < num_slots<Rule>; ++s) {
        const Slot& slot = tensor.slots[s];
        v[s] = slot.dtype == DType::int8_blocks ? static_cast<T>(values[s][i - begin])
                                                : static_cast<T>(get(slot.dtype, slot.data, i));
      }
      apply(Rule{}, k, p, g, v);
      put(tensor.param_dtype, tensor.param, i, p);
      if (tensor.copy) put(tensor.copy_dtype, tensor.copy, i, p);
      for (int s = 0; s < num_slots<Rule>; ++s) {
        const Slot& slot = tensor.slots[s];
        if (slot.dtype == DType::int8_blocks)
          values[s][i - begin] = static_cast<float>(v[s]);
        else
          put(slot.dtype, slot.data, i, v[s]);
      }
    }
    for (int s = 0; s < num_slots<Rule>; ++s)
      if (tensor.slots[s].dtype == DType::int8_blocks)
        encode_block(values[s], tensor.slots[s], begin, count);
  }
}

// --- the norm tree ----------------------------------------------------------------------------

/// Adds rows of 32 lanes in order, then folds the lanes.
inline double sum_tile(const std::vector<double>& values) {
  double lane[32] = {};
  for (std::size_t i = 0; i < values.size(); ++i) lane[i % 32] += values[i];
  for (int half = 16; half >= 1; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

/// `values` cut into groups of 1024, each summed as a tile.
inline std::vector<double> sum_groups(const std::vector<double>& values) {
  std::vector<double> sums;
  for (std::size_t i = 0; i < values.size(); i += 1024)
    sums.push_back(sum_tile(
        {values.begin() + static_cast<std::ptrdiff_t>(i),
         values.begin() + static_cast<std::ptrdiff_t>(std::min(values.size(), i + 1024))}));
  return sums;
}

inline double sum_squares(const std::vector<Tensor>& tensors, double scale = 1.0) {
  std::vector<double> sums;
  for (const Tensor& tensor : tensors)
    for (std::int64_t begin = 0; begin < tensor.numel; begin += 16384) {
      std::vector<double> squares;
      for (std::int64_t i = begin; i < std::min(tensor.numel, begin + 16384); ++i) {
        const double x = get(tensor.grad_dtype, tensor.grad, i) * scale;
        squares.push_back(x * x);
      }
      std::vector<double> tiles = sum_groups(squares);
      tiles.resize(16);
      for (std::size_t half = 8; half >= 1; half /= 2)
        for (std::size_t t = 0; t < half; ++t) tiles[t] += tiles[t + half];
      sums.push_back(tiles[0]);
    }
  while (sums.size() > 1) sums = sum_groups(sums);
  return sums.empty() ? 0.0 : sums[0];
}

}  // namespace oracle
