#include "bindings/overlap.hpp"

#include <algorithm>

namespace fusedstep::bindings {

std::optional<std::pair<Span, Span>> find_overlap(std::vector<Span>& spans) {
  // A training loop passes the same buffers again and again, and sorting thousands of them costs as
  // much as updating them. The last accepted list is kept for comparison.
  static thread_local std::vector<Span> accepted;
  if (spans == accepted) return std::nullopt;
  std::vector<Span> original = spans;
  const auto by_begin = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (!std::is_sorted(spans.begin(), spans.end(), by_begin)) {
    std::sort(spans.begin(), spans.end(), by_begin);
  }
  const Span* reach = nullptr;         // the span seen so far that ends last
  const Span* output_reach = nullptr;  // the same among outputs
  for (const Span& span : spans) {
    const Span* other = span.is_output() ? reach : output_reach;
    if (other != nullptr && span.begin < other->end) return std::make_pair(*other, span);
    if (reach == nullptr || span.end > reach->end) reach = &span;
    if (span.is_output() && (output_reach == nullptr || span.end > output_reach->end)) {
      output_reach = &span;
    }
  }
  accepted = std::move(original);
  return std::nullopt;
}

}  // namespace fusedstep::bindings
