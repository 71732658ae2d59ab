#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "cuda_runtime.h"

/// Runs kernels.
namespace emulator {

/// A kernel with its arguments.
struct Kernel {
  const void* function;
  std::shared_ptr<const Body> body;
  dim3 grid, block;
};

struct Schedule {
  enum class Order { forward, backward, random };
  Order order = Order::forward;
  std::uint64_t seed = 1;
  int workers = 1;
};

/// Runs it to its end. The text says what its threads did wrong; it is empty if they did nothing.
std::string run(const Kernel& kernel, const Schedule& schedule);

/// Numbers that are random enough: 0 <= result < bound.
std::uint64_t random_below(std::uint64_t& state, std::uint64_t bound);

}  // namespace emulator
