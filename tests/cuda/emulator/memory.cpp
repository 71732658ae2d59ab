// The memory of devices: the host's, with guards around and never zero by chance.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "emulator.h"
#include "machine.hpp"

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#define EMULATOR_POISON(at, bytes) __asan_poison_memory_region(at, bytes)
#define EMULATOR_UNPOISON(at, bytes) __asan_unpoison_memory_region(at, bytes)
#else
#define EMULATOR_POISON(at, bytes) (static_cast<void>(at), static_cast<void>(bytes))
#define EMULATOR_UNPOISON(at, bytes) (static_cast<void>(at), static_cast<void>(bytes))
#endif

namespace emulator {
namespace {

constexpr std::size_t alignment = 256, guard = 256;
constexpr unsigned char fresh = 0xcd, stale = 0xdd, fence = 0xfb;

struct Memory {
  std::size_t bytes;
  int device;
  unsigned char* outer;  // with the guards; null if a test has it
};

/// By address.
std::multimap<std::uintptr_t, Memory>& memories() {
  static auto* all = new std::multimap<std::uintptr_t, Memory>;
  return *all;
}

std::uintptr_t address_of(const void* memory) { return reinterpret_cast<std::uintptr_t>(memory); }

/// From the beginning of `outer` to its end, guards included.
std::size_t outer_size(std::size_t bytes) {
  return guard + (bytes + guard + alignment - 1) / alignment * alignment;
}

bool are_guards_whole(const Memory& memory) {
  const unsigned char* const inner = memory.outer + guard;
  const unsigned char* const end = memory.outer + outer_size(memory.bytes);
  const auto whole = [](unsigned char byte) { return byte == fence; };
  EMULATOR_UNPOISON(memory.outer, guard);
  EMULATOR_UNPOISON(inner + memory.bytes, static_cast<std::size_t>(end - inner) - memory.bytes);
  const bool all = std::all_of(memory.outer, memory.outer + guard, whole) &&
                   std::all_of(inner + memory.bytes, end, whole);
  EMULATOR_POISON(memory.outer, guard);
  EMULATOR_POISON(inner + memory.bytes, static_cast<std::size_t>(end - inner) - memory.bytes);
  return all;
}

cudaError_t allocate(void** out, std::size_t bytes) {
  *out = nullptr;
  if (bytes == 0) return cudaSuccess;
  const std::int64_t room = machine().settings.memory - count_memory("allocated_bytes");
  if (bytes > static_cast<std::uint64_t>(std::max<std::int64_t>(room, 0)))
    return cudaErrorMemoryAllocation;
  const std::size_t size = outer_size(bytes);
  auto* outer = static_cast<unsigned char*>(std::aligned_alloc(alignment, size));
  if (!outer) return cudaErrorMemoryAllocation;
  std::memset(outer, fence, size);
  std::memset(outer + guard, fresh, bytes);
  EMULATOR_POISON(outer, guard);
  EMULATOR_POISON(outer + guard + bytes, size - guard - bytes);
  memories().insert({address_of(outer + guard), {bytes, host_thread().device, outer}});
  *out = outer + guard;
  return cudaSuccess;
}

cudaError_t release(void* memory) {
  const auto [begin, end] = memories().equal_range(address_of(memory));
  const auto found = std::find_if(begin, end, [](const auto& each) { return each.second.outer; });
  if (found == end) {
    machine().blame("cudaFree of what is no allocation");
    return cudaErrorInvalidValue;
  }
  const Memory freed = found->second;
  if (!are_guards_whole(freed))
    machine().blame("something was written beyond an allocation of " + std::to_string(freed.bytes) +
                    " bytes");
  memories().erase(found);
  std::memset(memory, stale, freed.bytes);
  EMULATOR_UNPOISON(freed.outer, outer_size(freed.bytes));
  std::free(freed.outer);
  return cudaSuccess;
}

}  // namespace

bool is_device_memory(const void* memory, std::size_t bytes, int device) {
  const std::uintptr_t begin = address_of(memory);
  for (auto at = memories().upper_bound(begin); at != memories().begin();) {
    --at;  // tests may register parts of what they have registered
    const auto& [address, found] = *at;
    if (begin - address + bytes <= found.bytes && (device < 0 || device == found.device))
      return true;
  }
  return false;
}

std::int64_t count_memory(const std::string& what) {
  std::int64_t allocations = 0, bytes = 0, broken = 0;
  for (const auto& [address, memory] : memories()) {
    if (!memory.outer) continue;
    ++allocations;
    bytes += static_cast<std::int64_t>(memory.bytes);
    broken += !are_guards_whole(memory);
  }
  return what == "allocations"       ? allocations
         : what == "allocated_bytes" ? bytes
         : what == "broken_guards"   ? broken
                                     : -1;
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaMalloc(void** out, std::size_t bytes) {
  return call("cudaMalloc", [=] {
    if (is_forbidden_while_capturing()) return cudaErrorStreamCaptureUnsupported;
    return allocate(out, bytes);
  });
}

cudaError_t cudaFree(void* memory) {
  return call("cudaFree", [=] {
    if (is_forbidden_while_capturing()) return cudaErrorStreamCaptureUnsupported;
    if (!memory) return cudaSuccess;
    run_everything();  // as drivers do
    return release(memory);
  });
}

void emulator_register(const void* memory, int64_t bytes, int device) {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  memories().insert({address_of(memory), {static_cast<std::size_t>(bytes), device, nullptr}});
}

void emulator_unregister(const void* memory) {
  const std::lock_guard<std::recursive_mutex> lock(machine().mutex);
  const auto [begin, end] = memories().equal_range(address_of(memory));
  const auto found = std::find_if(begin, end, [](const auto& each) { return !each.second.outer; });
  if (found != end) memories().erase(found);
}
