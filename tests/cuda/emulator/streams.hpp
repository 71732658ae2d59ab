#pragma once
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "blocks.hpp"
#include "machine.hpp"

/// Work that waits to be run.
namespace emulator {

struct Operation {
  cudaGraphNodeType type;
  Kernel kernel{};
  std::string name{};  // of the kernel
  void* to = nullptr;
  const void* from = nullptr;
  bool to_device = false, from_device = false;
  std::shared_ptr<std::vector<char>> staged{};  // what `from` held at the call
  int value = 0;
  std::size_t bytes = 0;
  std::uint64_t number = 0;  // of all operations, in the order of calls
};

using Operations = std::deque<Operation>;

struct Capture {
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool valid = true;
  Operations operations{};
};

struct Stream {
  int device;
  bool blocking;  ///< it waits for the legacy stream, and that for it
  bool legacy;
  Operations queue{};
  std::unique_ptr<Capture> capture{};
};

/// The stream of a handle, as the calling thread sees it; null if there is none.
Stream* find_stream(cudaStream_t handle);

/// Puts it into the stream, or into the graph that is being captured there.
cudaError_t enqueue(Stream& stream, Operation operation);
/// Why nothing can be put there, nor be waited for there if `waiting`.
cudaError_t check_stream(Stream& stream, bool waiting);

/// Runs what is in one stream, and all that this has to come after.
void run_stream(Stream& stream);
/// Runs one operation, now.
void execute(const Operation& operation);

/// All there are, in the order of their making.
std::vector<Stream*> all_streams();

}  // namespace emulator
