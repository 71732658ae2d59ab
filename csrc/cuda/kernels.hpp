#pragma once
#include <cuda_runtime.h>

#include "cuda/table.hpp"

/// The kernels, for the engine that launches them.
namespace fusedstep::cuda {

using Kernel = void (*)(Arguments);

/// Reads the gradients, then settles what the update does.
Kernel measure_kernel();

/// How many parts the list of rules is compiled in; shard num_shards is the kernel for all rules.
/// Each part is an object of its own (csrc/cuda/CMakeLists.txt), and knows only its own kernels.
constexpr int num_shards = 4;
template <int shard>
Kernel kernel_of_shard(int rule, Access access);

/// The kernel for rows that all have the rule `rule`; Access::any takes any rules.
Kernel update_kernel(int rule, Access access);

/// Words of 8 bytes that are to be put somewhere, each to its place, as arguments of the kernel
/// that does it: so they come in the order of the stream, from memory that nobody has to keep.
#if CUDART_VERSION >= 13000
constexpr std::size_t max_upload = 32768 - 64;  // a driver that runs this takes so many bytes
#else
constexpr std::size_t max_upload = 4096 - 64;
#endif
struct Upload {
  static constexpr std::size_t most = max_upload / 12 - 2;
  std::uint64_t* to;
  std::uint32_t count;
  std::uint32_t places[most];
  std::uint64_t words[most];
};
static_assert(sizeof(Upload) <= max_upload);
using UploadKernel = void (*)(Upload);
UploadKernel upload_kernel();

}  // namespace fusedstep::cuda
