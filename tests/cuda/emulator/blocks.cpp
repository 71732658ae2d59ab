#include "blocks.hpp"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>
#include <vector>

#include "fibers.hpp"
#include "watch.hpp"

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace emulator {

std::uint64_t random_below(std::uint64_t& state, std::uint64_t bound) {
  state += 0x9e3779b97f4a7c15u;  // SplitMix64
  std::uint64_t x = state;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return (x ^ (x >> 31)) % bound;
}

namespace {

constexpr unsigned warp_size = 32;

unsigned count_of(const dim3& size) { return size.x * size.y * size.z; }

/// 0 to n-1 in the order in which they have their turn.
std::vector<unsigned> turns(unsigned n, Schedule::Order order, std::uint64_t& random) {
  std::vector<unsigned> all(n);
  std::iota(all.begin(), all.end(), 0u);
  if (order == Schedule::Order::backward) std::reverse(all.begin(), all.end());
  if (order == Schedule::Order::random)
    for (unsigned i = n; i > 1; --i) std::swap(all[i - 1], all[random_below(random, i)]);
  return all;
}

enum class Operation { none, sync, ballot, shuffle, shuffle_xor };
constexpr const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::sync: return "__syncwarp";
    case Operation::ballot: return "__ballot_sync";
    case Operation::shuffle: return "__shfl_sync";
    case Operation::shuffle_xor: return "__shfl_xor_sync";
    default: return "nothing";
  }
}

/// One thread of a kernel.
struct Lane {
  enum class State { ready, at_barrier, in_warp, exited };
  State state = State::ready;
  uint3 index{};
  std::uint64_t value = 0;  // what it brings to an exchange in its warp, and what it gets
  int partner = 0, width = 0;
  Fences fences;
};

struct Warp {
  Operation operation = Operation::none;
  unsigned mask = 0, arrived = 0;
  Meeting meeting;
};

class Block {
 public:
  Block(const Kernel& kernel, Fibers& fibers) : kernel_(kernel), fibers_(fibers) {}

  void run(uint3 at, Schedule::Order order, std::uint64_t random);
  const std::string& fault() const { return fault_; }

  // What threads call.
  void barrier();
  void meet_warp(Operation operation, unsigned mask);
  Lane& current() { return lanes_[current_]; }

 private:
  static void run_lane(void* block);
  bool run_ready(const std::vector<unsigned>& order);
  void exchange(Warp& warp, unsigned first);
  [[noreturn]] void fail(const char* what, const char* more = "", const char* rest = "");
  std::string describe() const;

  const Kernel& kernel_;
  Fibers& fibers_;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  Meeting meeting_;
  char start_ = 0, end_ = 0;
  unsigned current_ = 0, waiting_ = 0, exited_ = 0;
  // Not a text yet: who says it never returns, and frees nothing.
  bool failed_ = false;
  const char* said_[3] = {"", "", ""};
  std::string fault_;
};

__thread Block* block = nullptr;  // the one that this thread of the system runs

std::string text(uint3 at) {
  std::string out = "(" + std::to_string(at.x);
  if (at.y || at.z) out += ", " + std::to_string(at.y) + ", " + std::to_string(at.z);
  return out + ")";
}

void Block::fail(const char* what, const char* more, const char* rest) {
  failed_ = true;
  said_[0] = what;
  said_[1] = more;
  said_[2] = rest;
  release_at(&end_);
  fibers_[current_].pause();  // for ever
  std::abort();
}

/// What went wrong: a thread has said so, or none can go on.
std::string Block::describe() const {
  const std::string at = "block " + text(blockIdx);
  if (failed_)
    return "thread " + text(lanes_[current_].index) + " of " + at + ": " + said_[0] + said_[1] +
           said_[2];
  std::string out = at + ": its threads wait for each other, " + std::to_string(waiting_) + " of " +
                    std::to_string(lanes_.size()) + " at __syncthreads()";
  for (const Warp& warp : warps_)
    if (warp.arrived) out += std::string(", others at ") + name_of(warp.operation);
  return out;
}

void Block::run_lane(void* self) {
  auto* const here = static_cast<Block*>(self);
  const unsigned number = here->current_;
  acquire_at(&here->start_);
  (*here->kernel_.body)();
  here->lanes_[number].state = Lane::State::exited;
  ++here->exited_;
  if (here->waiting_ > 0) here->fail("it has returned, and others wait for it at __syncthreads()");
  const Warp& warp = here->warps_[number / warp_size];
  if (warp.arrived && (warp.mask >> (number % warp_size) & 1u))
    here->fail("it has returned, and its warp waits for it at ", name_of(warp.operation));
  here->lanes_[number].fences.forget();
  release_at(&here->end_);
  here->fibers_[number].finish();
}

/// Lets every thread that can run have its turn; whether there was any.
bool Block::run_ready(const std::vector<unsigned>& order) {
  bool any = false;
  for (const unsigned number : order) {
    Lane& lane = lanes_[number];
    if (lane.state != Lane::State::ready) continue;
    any = true;
    current_ = number;
    threadIdx = lane.index;
    fibers_[number].resume();
    if (failed_) return false;
  }
  return any;
}

void Block::run(uint3 at, Schedule::Order order, std::uint64_t random) {
  const dim3& size = kernel_.block;
  const unsigned count = count_of(size);
  lanes_ = std::vector<Lane>(count);
  warps_ = std::vector<Warp>((count + warp_size - 1) / warp_size);
  for (unsigned i = 0; i < count; ++i) {
    lanes_[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    fibers_[i].prepare(run_lane, this);
  }
  block = this;
  watch_fibers();
  release_at(&start_);
  blockIdx = at;
  while (exited_ < count && run_ready(turns(count, order, random))) continue;
  if (failed_ || exited_ < count) fault_ = describe();
  acquire_at(&end_);
  block = nullptr;
}

void Block::barrier() {
  if (exited_ > 0) fail("it waits at __syncthreads(), and another thread has returned");
  Lane& self = current();
  char* const turn = meeting_.turn();
  release_at(turn);
  if (++waiting_ < lanes_.size()) {
    self.state = Lane::State::at_barrier;
    fibers_[current_].pause();
  } else {
    waiting_ = 0;
    meeting_.complete();
    for (Lane& lane : lanes_)
      if (lane.state == Lane::State::at_barrier) lane.state = Lane::State::ready;
  }
  acquire_at(turn);
}

/// Returns when all lanes of the mask have called it, and have got their values.
void Block::meet_warp(Operation operation, unsigned mask) {
  const unsigned first = current_ / warp_size * warp_size, lane = current_ - first;
  Warp& warp = warps_[current_ / warp_size];
  const char* const name = name_of(operation);
  if (!(mask >> lane & 1u)) fail(name, " with a mask that does not have its own bit");
  if (warp.arrived && warp.operation != operation)
    fail(name, ", and other lanes of its warp are at ", name_of(warp.operation));
  if (warp.arrived && warp.mask != mask) fail(name, ", and other lanes of its warp name others");
  for (unsigned other = 0; !warp.arrived && other < warp_size; ++other) {
    if (!(mask >> other & 1u)) continue;
    if (first + other >= lanes_.size()) fail(name, " names a lane that the block does not have");
    if (lanes_[first + other].state == Lane::State::exited)
      fail(name, " waits for a lane that has returned");
  }
  warp.operation = operation;
  warp.mask = mask;
  warp.arrived |= 1u << lane;
  Lane& self = current();
  // Exchanges alone order nothing in memory, says CUDA.
  char* const turn = operation == Operation::sync ? warp.meeting.turn() : nullptr;
  if (turn) release_at(turn);
  if (warp.arrived != mask) {
    self.state = Lane::State::in_warp;
    fibers_[current_].pause();
  } else {
    exchange(warp, first);
  }
  if (turn) acquire_at(turn);
}

/// All have arrived: what each gets, before the first of them goes on and brings something new.
void Block::exchange(Warp& warp, unsigned first) {
  std::uint64_t brought[warp_size] = {};
  unsigned votes = 0;
  for (unsigned i = 0; i < warp_size; ++i) {
    if (!(warp.mask >> i & 1u)) continue;
    brought[i] = lanes_[first + i].value;
    votes |= (brought[i] != 0 ? 1u : 0u) << i;
  }
  for (unsigned i = 0; i < warp_size; ++i) {
    if (!(warp.mask >> i & 1u)) continue;
    Lane& lane = lanes_[first + i];
    if (lane.state == Lane::State::in_warp) lane.state = Lane::State::ready;
    if (warp.operation == Operation::ballot) lane.value = votes;
    if (warp.operation != Operation::shuffle && warp.operation != Operation::shuffle_xor) continue;
    const auto width = static_cast<unsigned>(lane.width);
    const auto partner = static_cast<unsigned>(lane.partner);
    const unsigned part = i / width * width;
    unsigned source = warp.operation == Operation::shuffle ? part + partner % width : i ^ partner;
    if (source >= part + width) source = i;  // nothing comes from beyond
    // The value of a lane that does not take part is undefined.
    lane.value = warp.mask >> source & 1u ? brought[source] : 0xcdcdcdcdcdcdcdcdu;
  }
  if (warp.operation == Operation::sync) warp.meeting.complete();
  warp.operation = Operation::none;
  warp.arrived = 0;
}

/// What the blocks of a grid share.
struct Grid {
  const Kernel& kernel;
  const Schedule& schedule;
  std::vector<unsigned> order;
  std::vector<std::string> faults;  // of blocks
  std::atomic<unsigned> next{0};
  std::atomic<bool> failed{false};
};

void run_block(Grid& grid, unsigned turn, BorrowedThread& thread, Fibers& fibers) {
  const unsigned number = grid.order[turn];
  const dim3& size = grid.kernel.grid;
  thread.poison_shared_memory();
  blockDim = grid.kernel.block;
  gridDim = size;
  // On the heap, where what sanitizers know of an address ends with its life.
  const auto here = std::make_unique<Block>(grid.kernel, fibers);
  here->run({number % size.x, number / size.x % size.y, number / size.x / size.y},
            grid.schedule.order, grid.schedule.seed + number);
  grid.faults[number] = here->fault();
  if (!here->fault().empty()) grid.failed = true;
}

/// One after the other, as many as this thread of the system gets.
void run_blocks(Grid& grid) {
  BorrowedThread thread(grid.kernel.function);
  Fibers fibers(count_of(grid.kernel.block));
  const auto count = static_cast<unsigned>(grid.order.size());
  for (unsigned turn = grid.next++; turn < count && !grid.failed; turn = grid.next++)
    run_block(grid, turn, thread, fibers);
}

/// For ThreadSanitizer: a thread of the system and fibers of its own for each block, all of which
/// exist before the first one runs, so that nothing orders blocks but what the kernel does. (A
/// fiber that has been in a block has seen what that did.) They run one after the other all the
/// same. In larger grids some blocks share them, and are ordered.
void run_blocks_apart(Grid& grid) {
  constexpr unsigned most_fibers = 2048;  // each takes a megabyte
  const auto count = static_cast<unsigned>(grid.order.size());
  const unsigned size = count_of(grid.kernel.block);
  const unsigned sets = std::min(count, std::max(most_fibers / size, 2u));
  std::vector<Fibers> fibers;
  for (unsigned i = 0; i < sets; ++i) fibers.emplace_back(size);
  std::vector<Gate> gates(sets);
  std::vector<std::thread> threads;
  for (unsigned set = 0; set < sets; ++set) {
    threads.emplace_back([&, set] {
      gates[set].wait();
      BorrowedThread thread(grid.kernel.function);
      for (unsigned turn = set; turn < count && !grid.failed; turn += sets)
        run_block(grid, turn, thread, fibers[set]);
    });
  }
  for (unsigned set = 0; set < sets; ++set) {
    gates[set].open();
    threads[set].join();
  }
}

}  // namespace

std::string run(const Kernel& kernel, const Schedule& schedule) {
  const unsigned count = count_of(kernel.grid);
  std::uint64_t random = schedule.seed;
  Grid grid{kernel, schedule, turns(count, schedule.order, random),
            std::vector<std::string>(count)};
  const auto wanted = std::min(static_cast<unsigned>(std::max(schedule.workers, 1)), count);
  if constexpr (with_tsan) {
    run_blocks_apart(grid);
  } else if (wanted == 1) {
    run_blocks(grid);  // waking another thread up takes longer than running a small kernel
  } else {
    std::vector<std::thread> workers;
    for (unsigned i = 0; i < wanted; ++i) workers.emplace_back([&grid] { run_blocks(grid); });
    for (std::thread& worker : workers) worker.join();
  }
  for (const std::string& fault : grid.faults)
    if (!fault.empty()) return fault;
  return {};
}

// --- what kernels call --------------------------------------------------------------------------

std::uint64_t shuffle(bool by_xor, unsigned mask, std::uint64_t value, int lane, int width) {
  Lane& self = block->current();
  self.value = value;
  self.partner = lane;
  self.width = width;
  block->meet_warp(by_xor ? Operation::shuffle_xor : Operation::shuffle, mask);
  return self.value;
}

Fences& current_fences() { return block->current().fences; }

}  // namespace emulator

using emulator::Operation;

void __syncthreads() { emulator::block->barrier(); }

void __syncwarp(unsigned mask) { emulator::block->meet_warp(Operation::sync, mask); }

unsigned __ballot_sync(unsigned mask, int predicate) {
  emulator::Lane& self = emulator::block->current();
  self.value = predicate != 0;
  emulator::block->meet_warp(Operation::ballot, mask);
  return static_cast<unsigned>(self.value);
}
