#pragma once
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace fusedstep::bindings {

/// What an argument is, for messages and for the rules of overlap.
enum class Role : std::uint8_t { param, grad, copy, state, scalar };

/// The bytes from the first to the last element of one array.
struct Span {
  std::uintptr_t begin, end;
  std::uint32_t leaf;
  Role role;
  std::uint8_t slot;

  bool is_output() const { return role != Role::grad; }
  bool operator==(const Span& o) const {
    return begin == o.begin && end == o.end && role == o.role;
  }
};

/// The first two spans that share memory and of which at least one is written, if any. Gradients
/// may share memory. A strided gradient counts with the gaps between its elements. May reorder
/// `spans`.
std::optional<std::pair<Span, Span>> find_overlap(std::vector<Span>& spans);

}  // namespace fusedstep::bindings
