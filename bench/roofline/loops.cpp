#include "loops.hpp"

#include <cstring>

namespace fusedstep::roofline {
namespace {

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif

float read(const Streams& at, std::int64_t begin, std::int64_t end) {
  // Eight independent sums, written as registers: one alone is bound by the latency of the
  // addition.
  typedef float Register __attribute__((vector_size(sizeof(float) * width)));
  constexpr int sums = 8;
  const float* const g = static_cast<const float*>(at.grad);
  Register sum[sums] = {};
  std::int64_t i = begin;
  for (; i + sums * width <= end; i += sums * width) {
    for (int k = 0; k < sums; ++k) {
      Register x;
      std::memcpy(&x, g + i + k * width, sizeof x);
      sum[k] += x;
    }
  }
  for (int k = 1; k < sums; ++k) sum[0] += sum[k];
  float total = 0;
  for (int lane = 0; lane < width; ++lane) total += sum[0][lane];
  for (; i < end; ++i) total += g[i];
  return total;
}

float sgd(const Streams& at, std::int64_t begin, std::int64_t end) {
  float* const __restrict p = static_cast<float*>(at.param);
  const float* const __restrict g = static_cast<const float*>(at.grad);
  for (std::int64_t i = begin; i < end; ++i) p[i] += g[i];
  return 0;
}

float update(const Streams& at, std::int64_t begin, std::int64_t end) {
  float* const __restrict p = static_cast<float*>(at.param);
  const float* const __restrict g = static_cast<const float*>(at.grad);
  float* const __restrict v = static_cast<float*>(at.velocity);
  for (std::int64_t i = begin; i < end; ++i) {
    v[i] += g[i];
    p[i] += g[i];
  }
  return 0;
}

float moments(const Streams& at, std::int64_t begin, std::int64_t end) {
  float* const __restrict p = static_cast<float*>(at.param);
  const float* const __restrict g = static_cast<const float*>(at.grad);
  float* const __restrict m = static_cast<float*>(at.velocity);
  float* const __restrict s = static_cast<float*>(at.second);
  for (std::int64_t i = begin; i < end; ++i) {
    m[i] += g[i];
    s[i] += 1.0f;  // stays an average of squares for those who take its root
    p[i] += g[i];
  }
  return 0;
}

float update_bf16(const Streams& at, std::int64_t begin, std::int64_t end) {
  std::int16_t* const __restrict p = static_cast<std::int16_t*>(at.param);
  const std::int16_t* const __restrict g = static_cast<const std::int16_t*>(at.grad);
  float* const __restrict v = static_cast<float*>(at.velocity);
  // A minimum of bit patterns: no conversion, and the result is one of two valid numbers.
  for (std::int64_t i = begin; i < end; ++i) {
    v[i] += 1.0f;
    p[i] = p[i] < g[i] ? p[i] : g[i];
  }
  return 0;
}

}  // namespace

extern const Loops FUSEDSTEP_LOOPS{read, sgd, update, moments, update_bf16};

}  // namespace fusedstep::roofline
