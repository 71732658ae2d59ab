#include "bindings/cells.hpp"

#include <algorithm>

namespace fusedstep::bindings {

namespace {

bool is_unknown(const CellInfo& known) { return known.leaves > 0 && !known.exact; }

}  // namespace

int CellTable::take() {
  if (free_.empty()) {
    const int first = static_cast<int>(infos_.size());
    constexpr std::int64_t bytes = block_size * std::int64_t{sizeof(Cell)};
    blocks_.push_back(static_cast<Cell*>(arena_.allocate(bytes, alignof(Cell))));
    infos_.resize(infos_.size() + block_size);
    for (int k = block_size - 1; k >= 0; --k) free_.push_back(first + k);
  }
  const int cell = free_.back();
  free_.pop_back();
  info(cell) = {};
  return cell;
}

void CellTable::leave(int cell) {
  CellInfo& known = info(cell);
  if (--known.leaves == 0 && !known.pinned) free_.push_back(cell);
}

void CellTable::pin(int cell) {
  info(cell).pinned = true;
  info(cell).exact = false;
}

bool CellTable::knows_all() const { return std::none_of(infos_.begin(), infos_.end(), is_unknown); }

void CellTable::settle(const Gpu& gpu, const Stream& stream) {
  std::vector<Cell> block(block_size);
  for (std::size_t k = 0; k < blocks_.size(); ++k) {
    const auto first = infos_.begin() + static_cast<std::ptrdiff_t>(k * block_size);
    const auto last = first + block_size;
    if (std::none_of(first, last, is_unknown)) continue;
    gpu.copy_out(stream, "the progress of an optimizer", block.data(), blocks_[k],
                 block_size * std::int64_t{sizeof(Cell)});
    for (std::size_t i = 0; i < block_size; ++i) {
      CellInfo& known = first[static_cast<std::ptrdiff_t>(i)];
      if (!is_unknown(known)) continue;
      known.steps = block[i].steps;
      known.product = block[i].product;
      known.fresh = block[i].fresh != 0;
      known.exact = !known.pinned;
    }
  }
}

StepCounts::StepCounts(Arena& arena)
    : counts_(static_cast<Counts*>(arena.allocate(sizeof(Counts), alignof(Counts)))) {}

void StepCounts::look(const Gpu& gpu, const Stream& stream) const {
  Counts now;
  gpu.copy_out(stream, "the state of an optimizer", &now, counts_, sizeof now);
}

Counts StepCounts::take(const Gpu& gpu, const Stream& stream) {
  if (unsure_) {
    Counts now;
    gpu.copy_out(stream, "the steps of an optimizer", &now, counts_, sizeof now);
    known_.applied += now.applied - seen_.applied;
    known_.skipped += now.skipped - seen_.skipped;
    seen_ = now;
    unsure_ = captured_;
  }
  return std::exchange(known_, Counts{});
}

}  // namespace fusedstep::bindings
