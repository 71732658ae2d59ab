// Checks of the step engine without Python: skipped steps, staged gradients, the floating-point
// environment, threads. (Norms are in check_norms.cpp.) `check_engine threads` runs only what is
// for ThreadSanitizer. Prints "N passed, M failed"; the exit status is 1 if M > 0.

#include <atomic>
#include <cfenv>
#include <cstdlib>
#include <stdexcept>
#include <thread>

#include "checks.hpp"
#include "cpu/staging.hpp"
#include "cpu/threads.hpp"
#include "cpu/work.hpp"
#include "oracle.hpp"

namespace {

using namespace checks;

// --- skipped steps ----------------------------------------------------------------------------

void check_skip(const std::string& isa) {
  for (double bad : {HUGE_VAL, double{NAN}})
    for (const Storage& storage : storages) {
      const std::int64_t rest = storage.state == f32 ? 150000 : 3;  // for several threads
      Buffers all = make(storage, {5, 17000, 300, rest}, 1);
      oracle::put(storage.grad, all[1].grad.data(), 16999, bad);
      const Buffers before = all;
      for (int threads : {1, 3}) {
        Call call(tensors_of(all));
        call.rows[0].rule = 1;
        std::fill_n(call.rows[0].hyper, 7, 0.5);
        call.call.measure_norm = call.call.skip_nonfinite = true;
        call.call.num_threads = threads;
        call.run();
        const bool told = call.outcome.skipped && call.outcome.first_nonfinite == 1;
        check(told && difference(all, before).empty(), "skip " + isa + " " + name(storage));
      }
    }
}

// --- staged gradients -------------------------------------------------------------------------

struct Layout {
  std::vector<std::int64_t> shape, strides;  // strides in elements
};

template <class Source, class To>
void check_gather(GradLayout::Source source, DType to, const Layout& layout) {
  std::vector<Source> memory(20000);
  for (Source& x : memory)
    x = static_cast<Source>(static_cast<double>(generator()) * 0x1p-60 - 8.0);
  const int ndim = static_cast<int>(layout.shape.size());
  std::vector<std::int64_t> strides;
  for (std::int64_t stride : layout.strides)
    strides.push_back(stride * static_cast<std::int64_t>(sizeof(Source)));
  const GradLayout grad{source, ndim, layout.shape.data(), strides.data()};
  Tensor tensor{};
  tensor.grad = &memory[10000];
  tensor.layout = &grad;
  tensor.param_dtype = to;
  tensor.numel = 1;
  for (std::int64_t extent : layout.shape) tensor.numel *= extent;

  std::vector<To> expected, got;
  for (std::int64_t i = 0; i < tensor.numel; ++i) {
    std::int64_t at = 10000, rest = i;
    for (int d = ndim - 1; d >= 0; rest /= layout.shape[static_cast<std::size_t>(d)], --d)
      at += rest % layout.shape[static_cast<std::size_t>(d)] *
            layout.strides[static_cast<std::size_t>(d)];
    expected.push_back(static_cast<To>(memory[static_cast<std::size_t>(at)]));
  }
  for (std::int64_t begin = 0, count = 1; begin < tensor.numel;
       begin += count, count = count * 3 + 1) {
    count = std::min(count, tensor.numel - begin);
    got.resize(static_cast<std::size_t>(begin + count));
    cpu::gather(tensor, begin, count, &got[static_cast<std::size_t>(begin)]);
  }
  check(got == expected, "gather");
}

void check_staging() {
  const Layout layouts[] = {{{}, {}},
                            {{1000}, {1}},
                            {{1000}, {-3}},
                            {{50, 40}, {1, 50}},
                            {{50, 40}, {0, 1}},
                            {{30, 7}, {-200, 9}},
                            {{5, 6, 7}, {1, 35, 5}},
                            {{3, 4, 5, 6}, {0, 30, -6, 1}},
                            {{9, 1000}, {0, 0}}};
  using Source = GradLayout::Source;
  for (const Layout& layout : layouts) {
    check_gather<float, float>(Source::float32, f32, layout);
    check_gather<double, float>(Source::float64, bf16_, layout);
    check_gather<long double, float>(Source::longdouble, f16_, layout);
    check_gather<float, double>(Source::float32, f64, layout);
    check_gather<double, double>(Source::float64, f64, layout);
    check_gather<long double, double>(Source::longdouble, f64, layout);
  }
}

/// A float64 and a transposed gradient step like the same values in a dense float32 gradient.
void check_staged_step(const std::string& isa) {
  const std::int64_t rows = 301, columns = 503;
  Buffers dense = make({f32, f32, f32}, {rows * columns}, 1);
  Buffers staged = dense;
  std::vector<double> transposed(static_cast<std::size_t>(rows * columns));
  for (std::int64_t i = 0; i < rows * columns; ++i)
    transposed[static_cast<std::size_t>(i % columns * rows + i / columns)] =
        oracle::get(f32, dense[0].grad.data(), i);
  const std::int64_t shape[] = {rows, columns}, strides[] = {8, 8 * rows};
  const GradLayout layout{GradLayout::Source::float64, 2, shape, strides};
  std::vector<double> norms;
  for (int threads : {1, 3})
    for (bool use_layout : {false, true}) {
      Call call(tensors_of(use_layout ? staged : dense));
      if (use_layout) {
        call.tensors[0].grad = transposed.data();
        call.tensors[0].layout = &layout;
      }
      call.rows[0].rule = 1;
      std::fill_n(call.rows[0].hyper, 7, 0.5);
      call.rows[0].clip_norm = 1.0;
      call.call.measure_norm = true;
      call.call.num_threads = threads;
      call.run();
      norms.push_back(call.norms[0]);
    }
  check(difference(dense, staged).empty(), "staged step " + isa);
  check(norms == std::vector<double>(4, norms[0]), "staged norm " + isa);
}

// --- the floating-point environment -----------------------------------------------------------

/// Rounds upward and, on x86, flushes denormals while it lives.
class OddEnvironment {
 public:
  OddEnvironment() {
    std::fegetenv(&saved_);
    std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
    control_ = __builtin_ia32_stmxcsr();
#endif
  }
  ~OddEnvironment() { std::fesetenv(&saved_); }

  bool unchanged() const {
#if defined(__x86_64__)
    if (__builtin_ia32_stmxcsr() != control_) return false;
#endif
    return std::fegetround() == FE_UPWARD;
  }

 private:
  std::fenv_t saved_;
  unsigned control_ = 0;
};

/// New threads inherit the environment of their creator: ours live in an odd one from now on.
void start_odd_workers() {
  const OddEnvironment odd;
  cpu::run_region(3, [](void*, int) {}, nullptr);
}

void check_environment(const std::string& isa) {
  Buffers expected = make({f32, f32, f32}, {100003, 100003}, 1);
  for (TensorBuffers& one : expected) {
    one.grad.fill(1e-38);
    one.param.fill(1e-38);
  }
  const Buffers before = expected;
  const auto step = [](Buffers& all, int threads) {
    Call call(tensors_of(all));
    call.rows[0].rule = 1;
    std::fill_n(call.rows[0].hyper, 7, 0.3);
    call.rows[0].clip_norm = 1e-37;
    call.call.measure_norm = true;
    call.call.num_threads = threads;
    call.run();
    return call.norms[0];
  };
  const double norm = step(expected, 1);
  for (int threads : {1, 3}) {
    Buffers got = before;
    double odd_norm;
    {
      const OddEnvironment odd;
      odd_norm = step(got, threads);
      check(odd.unchanged(), "environment restored " + isa);
    }
    check(same(norm, odd_norm) && difference(got, expected).empty(), "environment " + isa);
  }
}

// --- threads ----------------------------------------------------------------------------------

void check_shares() {
  for (std::int64_t numel : {1, 16384, 40000, 3000000})
    for (int threads : {1, 2, 3, 7})
      for (std::uint32_t batch : {1u, 4u}) {
        std::vector<cpu::Chunk> chunks;
        for (std::uint32_t t = 0; t < 20; ++t) cpu::append_chunks(t, numel / (t + 1) + 1, chunks);
        std::int64_t elements = 0;
        for (const cpu::Chunk& chunk : chunks) elements += chunk.count;
        std::vector<cpu::Share> shares(static_cast<std::size_t>(threads));
        cpu::deal(chunks, elements, shares.data(), threads);
        std::vector<std::atomic<int>> visits(chunks.size());
        std::atomic<std::int64_t> total{0};
        std::vector<std::thread> workers;
        for (int t = 0; t < threads; ++t)
          if (t != 1)  // one never comes: the others take its share
            workers.emplace_back([&, t] {
              total += cpu::visit_shares(shares.data(), threads, t, batch,
                                         [&](std::uint32_t i) { ++visits[i]; });
            });
        for (std::thread& worker : workers) worker.join();
        const bool once =
            std::all_of(visits.begin(), visits.end(), [](const auto& n) { return n == 1; });
        check(once && total == static_cast<std::int64_t>(chunks.size()),
              "every chunk visited once");
      }
}

/// Several callers at once, each on several threads; with clip, so through all stages.
void check_concurrent_steps() {
  const Buffers before = make({f32, bf16_, f32}, {150000, 33, 70000, 1}, 1);
  const auto steps = [&](int threads) {
    Buffers all = before;
    for (int s = 0; s < 20; ++s) {
      Call call(tensors_of(all));
      call.rows[0].rule = 1;
      std::fill_n(call.rows[0].hyper, 7, 0.01 * (s + 1));
      call.rows[0].clip_norm = 100.0;
      call.call.measure_norm = true;
      call.call.num_threads = threads;
      call.run();
    }
    return all;
  };
  const Buffers expected = steps(1);
  std::vector<Buffers> got(3);
  std::vector<std::thread> callers;
  for (Buffers& mine : got) callers.emplace_back([&] { mine = steps(2); });
  for (std::thread& caller : callers) caller.join();
  for (const Buffers& mine : got)
    check(difference(mine, expected).empty(), "concurrent steps" + difference(mine, expected));
}

void check_all() {
  check_staging();
  for_each_isa([](const std::string& isa) {
    check_skip(isa);
    check_staged_step(isa);
    check_environment(isa);
  });
  bool refused = false;
  try {
    cpu::force_isa("sse9");
  } catch (const std::runtime_error&) {
    refused = true;
  }
  check(refused, "an unknown instruction set is refused");
  Call nothing({});
  nothing.call.measure_norm = true;
  nothing.run();
  check(nothing.norms[0] == 0 && !nothing.outcome.skipped, "a call without tensors");
}

}  // namespace

int main(int argc, char** argv) {
  // ThreadSanitizer knows our own threads, but not an OpenMP runtime's.
  setenv("FUSEDSTEP_THREADS_RUNTIME", "own", 1);
  start_odd_workers();
  const bool only_threads = argc > 1 && std::string(argv[1]) == "threads";
  if (!only_threads) check_all();
  check_shares();
  check_concurrent_steps();
  return report();
}
