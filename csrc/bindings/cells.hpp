#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/backend.hpp"

/// What a plan keeps on a device, and what the host knows of it.
namespace fusedstep::bindings {

/// How far some leaves have come, as far as the host knows.
struct CellInfo {
  std::int64_t steps = 0;
  double product = 1.0;
  bool fresh = false;      ///< see Cell
  bool exact = true;       ///< else all this is out of date: only the device knows
  bool pinned = false;     ///< a captured graph advances it, at any time
  std::size_t leaves = 0;  ///< whose progress it is
};

/// The cells of a plan. They stay where they are as long as this lives: graphs know the addresses.
class CellTable {
 public:
  static constexpr int none = -1;

  explicit CellTable(Arena& arena) : arena_(arena) {}

  /// One that nobody uses, with zeros or anything in it.
  int take();
  /// What was taken, and no leaf came to use.
  void put_back(int cell) { free_.push_back(cell); }
  Cell* at(int cell) const { return blocks_[block_of(cell)] + cell % block_size; }
  CellInfo& info(int cell) { return infos_[static_cast<std::size_t>(cell)]; }
  void join(int cell) { ++info(cell).leaves; }
  /// The last one that leaves makes it free.
  void leave(int cell);
  /// Nothing is freed any more, nor used again.
  void pin(int cell);

  bool knows_all() const;
  /// Reads what is not known.
  void settle(const Gpu& gpu, const Stream& stream);

 private:
  static constexpr int block_size = 1024;
  static std::size_t block_of(int cell) { return static_cast<std::size_t>(cell / block_size); }

  Arena& arena_;
  std::vector<Cell*> blocks_;
  std::vector<CellInfo> infos_;
  std::vector<int> free_;
};

/// The steps of a plan that were applied, and skipped ones, since somebody last asked.
class StepCounts {
 public:
  explicit StepCounts(Arena& arena);

  void add_applied() { ++known_.applied; }
  void add_skipped() { ++known_.skipped; }
  /// For a step of which the device decides; one that is `captured` may come again at any time.
  Counts* on_device(bool captured) {
    unsure_ = true;
    captured_ = captured_ || captured;
    return counts_;
  }
  bool is_unsure() const { return unsure_; }
  /// Waits only if the device knows more.
  Counts take(const Gpu& gpu, const Stream& stream);
  /// Waits for what is in the stream.
  void look(const Gpu& gpu, const Stream& stream) const;

 private:
  Counts* counts_;
  Counts known_{}, seen_{};
  bool unsure_ = false, captured_ = false;
};

/// All of it.
class DeviceSide {
 public:
  explicit DeviceSide(const Gpu& device)
      : gpu(device), workspace(device), arena(device), cells(arena), counts(arena) {}
  ~DeviceSide() {
    if (!captured) return;
    workspace.keep_for_good();  // a graph may be replayed when the optimizer is gone
    arena.keep_for_good();
  }
  DeviceSide(const DeviceSide&) = delete;
  DeviceSide& operator=(const DeviceSide&) = delete;

  const Gpu gpu;
  Workspace workspace;
  Arena arena;
  CellTable cells;
  StepCounts counts;
  Stream last;               ///< of the last step that was not captured
  bool last_is_seen = true;  ///< not a given stream, or it has been waited for
  bool captured = false;
};

}  // namespace fusedstep::bindings
