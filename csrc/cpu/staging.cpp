#include "cpu/staging.hpp"

#include <algorithm>
#include <cstring>

#include "core/float16.hpp"

namespace fusedstep::cpu {
namespace {

// --- one run of equally spaced elements -------------------------------------------------------

template <class To, class From>
To convert(From x) {
  return static_cast<To>(x);
}
template <class To>
To convert(f16 x) {
  return to_float(x);
}
template <class To>
To convert(bf16 x) {
  return to_float(x);
}

template <class To, class From>
void copy_run(const char* from, std::int64_t stride, std::int64_t count, char* to) {
  const auto copy_one = [&](std::int64_t i, std::int64_t step) {
    From x;
    std::memcpy(&x, from + i * step, sizeof x);
    const To converted = convert<To>(x);
    std::memcpy(to + i * static_cast<std::int64_t>(sizeof(To)), &converted, sizeof converted);
  };
  constexpr std::int64_t dense = sizeof(From);
  if (stride == dense) {  // a loop of its own, which the compiler vectorizes
    for (std::int64_t i = 0; i < count; ++i) copy_one(i, dense);
  } else {
    for (std::int64_t i = 0; i < count; ++i) copy_one(i, stride);
  }
}

using CopyRun = void (*)(const char* from, std::int64_t stride, std::int64_t count, char* to);

template <class To>
CopyRun copy_run_from(GradLayout::Source source) {
  switch (source) {
    case GradLayout::Source::float16: return copy_run<To, f16>;
    case GradLayout::Source::bfloat16: return copy_run<To, bf16>;
    case GradLayout::Source::float32: return copy_run<To, float>;
    case GradLayout::Source::float64: return copy_run<To, double>;
    default: return copy_run<To, long double>;
  }
}

// --- all dimensions ---------------------------------------------------------------------------

struct Walk {
  const GradLayout& layout;
  CopyRun copy;
  std::int64_t to_size;  ///< bytes of a staged element
};

/// Copies elements [begin, begin + count) of the sub-array of `size` elements at `from` that
/// dimensions `dim` and up span. Returns the end of what it wrote.
char* gather_from(const Walk& walk, int dim, const char* from, std::int64_t size,
                  std::int64_t begin, std::int64_t count, char* to) {
  const int innermost = walk.layout.ndim - 1;
  const std::int64_t stride = innermost < 0 ? 0 : walk.layout.strides[dim];
  if (dim >= innermost) {
    walk.copy(from + begin * stride, stride, count, to);
    return to + count * walk.to_size;
  }
  const std::int64_t below = size / walk.layout.shape[dim];
  std::int64_t i = begin / below;
  begin -= i * below;
  for (; count > 0; ++i, begin = 0) {
    const std::int64_t part = std::min(count, below - begin);
    to = gather_from(walk, dim + 1, from + i * stride, below, begin, part, to);
    count -= part;
  }
  return to;
}

}  // namespace

void gather(const Tensor& tensor, std::int64_t begin, std::int64_t count, void* staging) {
  const GradLayout& layout = *tensor.layout;
  const DType to = arithmetic_of(tensor.param_dtype);
  const CopyRun copy = to == DType::float64 ? copy_run_from<double>(layout.source)
                                            : copy_run_from<float>(layout.source);
  const Walk walk{layout, copy, static_cast<std::int64_t>(size_of(to))};
  gather_from(walk, 0, static_cast<const char*>(tensor.grad), tensor.numel, begin, count,
              static_cast<char*>(staging));
}

}  // namespace fusedstep::cpu
