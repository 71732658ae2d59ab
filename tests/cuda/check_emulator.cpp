// Checks of the emulator: that what is right gives the right numbers in every order, and that what
// is wrong is found. Prints "N passed, M failed"; the exit status is 1 if M > 0. With the name of a
// wrong kernel it runs that one, for ctest to see how a sanitizer ends it.

#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "emulator.h"
#include "toys.hpp"

namespace {

using namespace toys;

long passed = 0, failed = 0;

void check(bool right, const std::string& what) {
  ++(right ? passed : failed);
  if (!right) std::printf("FAILED: %s\n", what.c_str());
}

void succeed(cudaError_t error, const std::string& what) {
  check(error == cudaSuccess, what + ": " + cudaGetErrorName(error));
}

template <class T>
T* device(std::size_t count) {
  void* memory = nullptr;
  succeed(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}

template <class T>
std::vector<T> host(const T* memory, std::size_t count, cudaStream_t stream = nullptr) {
  std::vector<T> out(count);
  succeed(cudaMemcpyAsync(out.data(), memory, count * sizeof(T), cudaMemcpyDeviceToHost, stream),
          "copy to the host");
  succeed(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return out;
}

template <class P>
cudaError_t launch(void (*kernel)(P), P argument, dim3 grid = 1, dim3 block = threads,
                   cudaStream_t stream = nullptr) {
  void* arguments[] = {&argument};
  const cudaError_t error = cudaLaunchKernel(kernel, grid, block, arguments, 0, stream);
  std::memset(&argument, 0xee, sizeof argument);  // it has been copied
  return error;
}

// --- kernels ----------------------------------------------------------------------------------

const char* const orders[] = {"forward", "backward", "random"};

/// In every order of threads and blocks.
template <class Body>
void in_every_order(Body body) {
  for (int order = 0; order < 3; ++order) {
    for (int workers : {1, 3}) {
#if defined(EMULATOR_TSAN)
      if (workers == 1) continue;  // the number means nothing there
#endif
      emulator_reset();
      emulator_set("order", order);
      emulator_set("workers", workers);
      body(std::string(orders[order]) + ", " + std::to_string(workers) + " workers");
      check(emulator_fault() == nullptr, "no fault");
    }
  }
  emulator_reset();
}

struct Summation {
  static constexpr unsigned count = 5000, blocks = 4;
  Sum argument{device<double>(count), device<double>(blocks), device<double>(1),
               device<unsigned>(1), count};
  Summation() {
    std::vector<double> values(count);
    std::iota(values.begin(), values.end(), 1.0);
    auto* in = const_cast<double*>(argument.in);
    succeed(cudaMemcpyAsync(in, values.data(), sizeof(double) * count, cudaMemcpyHostToDevice),
            "copy to the device");
    succeed(cudaMemsetAsync(argument.ticket, 0, sizeof(unsigned)), "cudaMemsetAsync");
  }
  ~Summation() {
    for (void* memory : {static_cast<void*>(const_cast<double*>(argument.in)),
                         static_cast<void*>(argument.partial), static_cast<void*>(argument.out),
                         static_cast<void*>(argument.ticket)})
      succeed(cudaFree(memory), "cudaFree");
  }
};

void check_sums() {
  in_every_order([](const std::string& how) {
    const Summation sum;
    for (int repeat = 0; repeat < 2; ++repeat)
      succeed(launch(sum_up<true, Fence::right>, sum.argument, Summation::blocks), "sum_up");
    check(host(sum.argument.out, 1)[0] == 5000.0 * 5001.0 / 2, "sum_up, " + how);
  });
}

void check_indices() {
  in_every_order([](const std::string& how) {
    constexpr unsigned count = 24 * 60;
    auto* const out = device<unsigned>(count);
    succeed(launch(identify, Numbers{out, 7}, dim3(2, 3, 4), dim3(3, 4, 5)), "identify");
    const std::vector<unsigned> got = host(out, count);
    for (unsigned i = 0; i < count; ++i) check(got[i] == 7 + i % 60, "identify, " + how);
    succeed(cudaFree(out), "cudaFree");
  });
}

void check_exchanges() {
  in_every_order([](const std::string& how) {
    auto* const out = device<unsigned>(std::size_t{5} * threads);
    succeed(launch(exchange, Numbers{out, 0}), "exchange");
    const std::vector<unsigned> got = host(out, std::size_t{5} * threads);
    for (unsigned t = 0; t < threads; ++t) {
      unsigned votes = 0;
      for (unsigned lane = 0; lane < 32; ++lane)
        votes |= ((t / 32 * 32 + lane) % 3 == 0 ? 1u : 0u) << lane;
      const unsigned want[] = {t / 32 * 32 + (t + 1) % 32, t ^ 5, t ^ 3, t / 4 * 4 + 2, votes};
      check(std::memcmp(want, &got[std::size_t{5} * t], sizeof want) == 0, "exchange, " + how);
    }
    succeed(cudaFree(out), "cudaFree");
  });
}

void check_barriers() {
  in_every_order([](const std::string& how) {
    auto* const out = device<unsigned>(threads);
    succeed(launch(rotate, Numbers{out, 50}), "rotate");
    std::vector<unsigned> got = host(out, threads);
    for (unsigned t = 0; t < threads; ++t) check(got[t] == (t + 50) % threads, "rotate, " + how);
    succeed(launch(rotate_in_warps, Numbers{out, 50}), "rotate_in_warps");
    got = host(out, threads);
    for (unsigned t = 0; t < threads; ++t)
      check(got[t] == t / 32 * 32 + (t + 50) % 32, "rotate_in_warps, " + how);
    succeed(cudaFree(out), "cudaFree");
  });
}

/// With kernels that ThreadSanitizer rightly complains of.
[[maybe_unused]] void check_orders() {
  auto* const out = device<unsigned>(threads);
  const auto ends_with = [&](int order, int seed, void (*kernel)(Numbers), unsigned blocks) {
    emulator_reset();
    emulator_set("order", order);
    emulator_set("seed", seed);
    succeed(launch(kernel, Numbers{out, 0}, blocks), "race");
    return host(out, 1)[0];
  };
  check(ends_with(0, 1, race, 1) == threads - 1, "threads forward");
  check(ends_with(1, 1, race, 1) == 0, "threads backward");
  check(ends_with(2, 1, race, 1) != ends_with(2, 2, race, 1), "threads by two seeds");
  check(ends_with(2, 2, race, 1) == ends_with(2, 2, race, 1), "threads by the same seed");
  check(ends_with(0, 1, race_of_blocks, 99) == 98, "blocks forward");
  check(ends_with(1, 1, race_of_blocks, 99) == 0, "blocks backward");
  check(ends_with(2, 1, race_of_blocks, 99) != ends_with(2, 2, race_of_blocks, 99),
        "blocks by two seeds");
  emulator_reset();
  succeed(launch(read_uninitialized, Numbers{out, 0}), "read_uninitialized");
  for (const unsigned x : host(out, threads)) check(x == 0xcdcdcdcdu, "shared memory is not zero");
  succeed(cudaFree(out), "cudaFree");
}

/// (Threads that are stopped amid a kernel tell ThreadSanitizer nothing of their end.)
[[maybe_unused]] void check_faults() {
  struct Wrong {
    void (*kernel)(Numbers);
    const char* text;
  };
  constexpr Wrong all[] = {
      {leave_before_barrier, "__syncthreads()"},
      {leave_before_shuffle, "waits for"},
      {part_of_warp, "wait for each other"},
      {two_operations, "other lanes of its warp"},
  };
  for (int order = 0; order < 3; ++order) {
    for (const Wrong& wrong : all) {
      emulator_reset();
      emulator_set("order", order);
      auto* const out = device<unsigned>(threads);
      succeed(launch(wrong.kernel, Numbers{out, 0}, 3), "launch of a wrong kernel");
      check(cudaStreamSynchronize(nullptr) == cudaErrorLaunchFailure, "found when waited for");
      const char* const fault = emulator_fault();
      check(fault && std::strstr(fault, wrong.text), std::string("fault: ") + wrong.text);
      check(fault && std::strstr(fault, emulator_launched(0)), "the kernel is named");
      check(cudaFree(out) == cudaErrorLaunchFailure, "nothing works after it");
      check(emulator_count("kernel_errors") == 1, "kernel_errors");
      emulator_reset();
      succeed(cudaFree(out), "cudaFree after a reset");
    }
  }
}

/// What a sanitizer, or the check of alignments, finds: the program does not survive it.
int run_wrong(const std::string& name) {
  const Summation sum;
  auto* const out = device<unsigned>(std::size_t{8} * threads);
  const auto run = [&](auto kernel, auto argument, unsigned blocks) {
    succeed(launch(kernel, argument, blocks), name);
    succeed(cudaStreamSynchronize(nullptr), name);
    return failed > 0;
  };
  if (name == "right") return run(sum_up<true, Fence::right>, sum.argument, Summation::blocks);
  if (name == "no_barrier") return run(sum_up<false, Fence::right>, sum.argument, 1);
  if (name == "no_fence") return run(sum_up<true, Fence::none>, sum.argument, Summation::blocks);
  if (name == "fence_before_barrier")
    return run(sum_up<true, Fence::before_barrier>, sum.argument, Summation::blocks);
  if (name == "race_of_blocks") return run(race_of_blocks, Numbers{out, 0}, 2);
  if (name == "misaligned") return run(misaligned, Numbers{out, 0}, 1);
  if (name == "beyond") return run(beyond, Numbers{out, 8 * threads}, 1);
  std::printf("no wrong kernel is called %s\n", name.c_str());
  return 2;
}

}  // namespace

void check_runtime(void (*check)(bool, const std::string&));

int main(int argc, char** argv) {
  if (argc > 1) return run_wrong(argv[1]);
  check_sums();
  check_indices();
  check_exchanges();
  check_barriers();
#if !defined(EMULATOR_TSAN)
  check_orders();
  check_faults();
#endif
  check_runtime(check);
  check(emulator_count("allocations") == 0, "everything has been freed");
  std::printf("%ld passed, %ld failed\n", passed, failed);
  return failed > 0;
}
