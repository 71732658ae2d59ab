// Conformance of the CPU kernels and the step engine without Python, for sanitizers and new
// machines: everything is compared bit for bit with oracle.hpp. `check_kernels threads` runs only
// what several threads do. Prints "N passed, M failed"; the exit status is 1 if M > 0.

#include <atomic>
#include <cfenv>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>

#include "buffers.hpp"
#include "core/float16.hpp"
#include "cpu/isa.hpp"
#include "cpu/staging.hpp"
#include "cpu/step.hpp"
#include "cpu/work.hpp"
#include "oracle.hpp"

namespace {

using namespace fusedstep;
using namespace buffers;

long passed = 0, failed = 0;

bool check(bool right, const std::string& what) {
  ++(right ? passed : failed);
  if (!right && failed <= 50) std::printf("FAILED: %s\n", what.c_str());
  return right;
}

// --- calls ------------------------------------------------------------------------------------

/// A call in the making, with one row and one scope unless told otherwise.
struct Call {
  std::vector<Tensor> tensors;
  std::vector<Row> rows{Row{}};
  std::vector<double> scales{1.0}, norms, clips;
  StepCall call{};
  StepOutcome outcome{};

  explicit Call(std::vector<Tensor> all) : tensors(std::move(all)) {
    rows[0].coefficients_given = true;
    rows[0].rescale_grad = rows[0].sign = 1.0;
    rows[0].clip_norm = rows[0].clip_value = HUGE_VAL;
    call.joint = true;
    call.num_threads = 1;
  }
  void run() {
    call.tensors = tensors.data();
    call.num_tensors = static_cast<std::int64_t>(tensors.size());
    call.rows = rows.data();
    call.num_rows = static_cast<int>(rows.size());
    call.num_scopes = static_cast<int>(scales.size());
    call.scope_scale = scales.data();
    norms.assign(scales.size(), -1.0);
    clips.assign(rows.size(), -1.0);
    outcome = {norms.data(), clips.data(), true, -2};
    cpu::step(call, outcome);
  }
};

void for_each_isa(const std::function<void(const std::string&)>& body) {
  for (const std::string& isa : cpu::available_isas()) {
    cpu::force_isa(isa);
    check(cpu::active_isa() == isa, "force_isa " + isa);
    body(isa);
  }
  cpu::force_isa("");
}

// --- conversions ------------------------------------------------------------------------------

std::vector<float> rounding_cases() {
  std::vector<float> cases;
  for (std::uint32_t upper = 0; upper < 65536; ++upper)
    for (std::uint32_t lower :
         {0x0u, 0x1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu, 0xfffu, 0x1000u, 0x1001u, 0x3000u})
      cases.push_back(float_of(upper << 16 | lower));
  for (int half_steps = 0; half_steps <= 4097; ++half_steps) {  // float16 subnormals and ties
    const float x = std::ldexp(static_cast<float>(half_steps), -25);
    for (float y : {x, std::nextafter(x, 1.0f), std::nextafter(x, -1.0f)})
      cases.insert(cases.end(), {y, -y});
  }
  return cases;
}

void check_conversions() {
  bool f16_in = true, bf16_in = true, f16_out = true, bf16_out = true;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    f16_in &= same(to_float(f16{pattern}), oracle::get(f16_, &pattern, 0));
    bf16_in &= same(to_float(bf16{pattern}), oracle::get(bf16_, &pattern, 0));
  }
  for (float x : rounding_cases()) {
    std::uint16_t half, brain;
    oracle::put(f16_, &half, 0, x);
    oracle::put(bf16_, &brain, 0, x);
    f16_out &= std::isnan(x) ? std::isnan(to_float(to_f16(x))) : to_f16(x).bits == half;
    bf16_out &= to_bf16(x).bits == brain;
  }
  check(f16_in, "float16 -> float32");
  check(bf16_in, "bfloat16 -> float32");
  check(f16_out, "float32 -> float16");
  check(bf16_out, "float32 -> bfloat16");
}

/// The kernels' own conversions: lr = 0 stores the parameter as it is, and its copy rounded.
void check_kernel_conversions(const std::string& isa) {
  const std::vector<float> cases = rounding_cases();
  const auto numel = static_cast<std::int64_t>(cases.size());
  for (DType copy : {f16_, bf16_}) {
    Buffers got;
    got.emplace_back(Storage{f32, f32, f32, copy}, numel, 0, 1);
    std::memcpy(got[0].param.data(), cases.data(), cases.size() * sizeof(float));
    Buffers expected = got;
    Call call(tensors_of(got));
    call.run();
    oracle::update<Sgd, float>(expected[0].tensor(), call.rows[0].hyper, 1.0, HUGE_VAL);
    check(difference(got, expected).empty(), isa + " stores " + name_of(copy));

    Buffers all;
    all.emplace_back(Storage{copy, copy, f32}, 65536, 0, 1);
    for (std::int64_t i = 0; i < 65536; ++i)
      oracle::set(all[0].param.data(), i, static_cast<std::uint16_t>(i));
    const Buffers before = all;
    Call unchanged(tensors_of(all));
    unchanged.run();
    check(difference(all, before).empty(), isa + " loads and stores all " + name_of(copy));
  }
}

// --- rules x storage --------------------------------------------------------------------------

std::vector<std::vector<double>> coefficient_sets(Sgd) {
  return {{0.037, -0.11, 0.043},
          {0.0, -0.11, 0.0},
          {0.037, -0.11, 0.0},
          {0.0, 0.0, 0.3},
          {0.0, 0.0, 0.0}};
}
std::vector<std::vector<double>> coefficient_sets(Momentum) {
  return {{0.037, 0.83, 0.61, 0.57, 0.29, -0.11, 0.043},
          {0.01, 0.9, 1.0, 0.9, 1.0, -0.1, 0.0},
          {0.0, 0.9, 1.0, 1.0, 0.0, -0.1, 0.0},
          {0.0, 0.9, -0.1, 0.9, -0.1, 1.0, 0.02},
          {0.0, 0.0, 0.5, 0.0, 0.7, -0.1, 0.0},
          {0.0, 0.9, 0.0, 0.7, 0.0, -0.1, 0.0},
          {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0}};
}

std::vector<std::int64_t> small_sizes() {
  std::vector<std::int64_t> sizes;
  for (std::int64_t n = 1; n <= 3 * 16 + 5; ++n) sizes.push_back(n);
  for (std::int64_t border : {block_size, std::int64_t{1024}})
    for (std::int64_t n : {border - 1, border, border + 1}) sizes.push_back(n);
  return sizes;
}

/// Around all borders, and enough elements for several threads.
std::vector<std::int64_t> border_sizes() {
  std::vector<std::int64_t> sizes = small_sizes();
  for (std::int64_t n : {chunk_size - 1, chunk_size, chunk_size + 1, 2 * chunk_size + 1})
    sizes.push_back(n);
  sizes.push_back(100003);
  return sizes;
}

template <class Rule>
void oracle_step(Buffers& all, const std::vector<double>& k, const Row& row) {
  for (const TensorBuffers& one : all) {
    const double scale = row.sign * row.rescale_grad;
    if (one.param.dtype() == f64)
      oracle::update<Rule, double>(one.tensor(), k.data(), scale, row.clip_value);
    else
      oracle::update<Rule, float>(one.tensor(), k.data(), scale, row.clip_value);
  }
}

/// Infinities, NaN and zeros of both signs among the gradients and states.
void add_special_values(Buffers& all) {
  const double special[] = {HUGE_VAL, -HUGE_VAL, NAN, 0.0, -0.0, 1e-42, -1e-42};
  for (TensorBuffers& one : all) {
    for (std::size_t k = 0; k < std::size(special); ++k) {
      const std::int64_t i = static_cast<std::int64_t>(k) * 5;
      if (i < one.grad.numel()) oracle::put(one.grad.dtype(), one.grad.data(), i, special[k]);
      if (i + 1 < one.state[0].numel() && one.state[0].dtype() != int8)
        oracle::put(one.state[0].dtype(), one.state[0].data(), i + 1, special[k]);
    }
  }
}

template <class Rule>
void check_rule(int index) {
  constexpr int steps = 3;
  int turn = 0;
  for (const Storage& storage : storages) {
    auto sizes = border_sizes();  // for the first set of coefficients, which uses all
    for (const std::vector<double>& k : coefficient_sets(Rule{})) {
      Buffers before = make(storage, sizes, num_slots<Rule>);
      sizes = small_sizes();
      if (turn % 2) add_special_values(before);
      Row row = Call({}).rows[0];
      row.rule = index;
      std::copy(k.begin(), k.end(), row.hyper);
      if (turn % 3 == 1) row.rescale_grad = -3.7;
      if (turn % 3 == 2) row.clip_value = 0.4;
      ++turn;
      Buffers expected = before;
      for (int s = 0; s < steps; ++s) oracle_step<Rule>(expected, k, row);
      for_each_isa([&](const std::string& isa) {
        Buffers got = before;
        Call call(tensors_of(got));
        call.rows[0] = row;
        call.call.num_threads = turn % 2 ? 1 : 3;
        for (int s = 0; s < steps; ++s) call.run();
        const std::string text = difference(got, expected);
        check(text.empty(), std::string(Rule::name) + " " + name(storage) + " " + isa + text);
      });
    }
  }
}

/// Blocks of a block-wise stored state whose scale is subnormal, zero, NaN and ordinary.
void check_block_scales() {
  Buffers before = make({f32, f32, int8}, {4 * block_size + 3}, 1);
  for (std::int64_t i = 0; i < block_size; ++i) {
    oracle::put(f32, before[0].grad.data(), i, std::ldexp(static_cast<double>(i % 191), -149));
    oracle::put(f32, before[0].grad.data(), block_size + i, 0.0);
  }
  oracle::put(f32, before[0].grad.data(), 2 * block_size + 7, -HUGE_VAL);
  const std::vector<double> k = {0.0, 0.0, 1.0, 1.0, 0.0, -0.1, 0.0};
  Buffers expected = before;
  Row row = Call({}).rows[0];
  row.rule = 1;
  std::copy(k.begin(), k.end(), row.hyper);
  oracle_step<Momentum>(expected, k, row);
  for_each_isa([&](const std::string& isa) {
    Buffers got = before;
    Call call(tensors_of(got));
    call.rows[0] = row;
    call.run();
    check(difference(got, expected).empty(), "block scales " + isa + difference(got, expected));
  });
}

template <class... All>
void check_rules(RuleList<All...>) {
  int index = 0;
  (check_rule<All>(index++), ...);
}

// --- norms ------------------------------------------------------------------------------------

/// Of magnitudes so different that every order of additions gives other bits, 16-bit types too.
Buffers gradients(DType dtype, const std::vector<std::int64_t>& sizes, double magnitude = 1.0) {
  Buffers all = make({dtype == f64 ? f64 : f32, dtype, f32}, sizes, 0);
  for (TensorBuffers& one : all) {
    one.grad.fill(magnitude);
    for (std::int64_t i = 0; i < one.grad.numel(); ++i) {
      const double x = oracle::get(dtype, one.grad.data(), i);
      oracle::put(dtype, one.grad.data(), i,
                  std::ldexp(x, static_cast<int>(generator() % 25) - 12));
    }
  }
  return all;
}

void check_norm_tree(const std::string& isa) {
  std::vector<std::int64_t> sizes = border_sizes();
  sizes.insert(sizes.end(), 1500, 3);  // more than 1024 chunks: two levels of the upper tree
  for (DType dtype : {f64, f32, f16_, bf16_}) {
    const Buffers all = gradients(dtype, sizes);
    const std::vector<Tensor> tensors = tensors_of(all);
    const double expected = oracle::sum_squares(tensors);
    for (int threads : {1, 2, 5})
      check(
          same(cpu::sum_squares(tensors.data(), static_cast<std::int64_t>(tensors.size()), threads),
               expected),
          "sum_squares " + isa + " " + name_of(dtype));
    for (const Tensor& tensor : tensors)
      if (tensor.numel > 3 || tensor.grad == tensors.back().grad)
        check(same(cpu::sum_squares(&tensor, 1, 1), oracle::sum_squares({tensor})),
              "sum_squares " + isa + " " + name_of(dtype) + " " + std::to_string(tensor.numel));
  }
  check(same(cpu::sum_squares(nullptr, 0, 2), 0.0), "sum_squares of nothing");
}

void check_second_look(const std::string& isa) {
  for (double magnitude : {1e-320, 1e-200, 1e-140, 1.0, 1e160, 1e300}) {
    const Buffers all = gradients(f64, {7, 20000, 200000}, magnitude);
    double largest = 0;
    for (const TensorBuffers& one : all)
      for (std::int64_t i = 0; i < one.grad.numel(); ++i)
        largest = std::max(largest, std::fabs(oracle::get(f64, one.grad.data(), i)));
    const int exponent = std::clamp(std::ilogb(largest), -1000, 1000);
    const std::vector<Tensor> tensors = tensors_of(all);
    const double plain = oracle::sum_squares(tensors);
    const bool safe = plain >= 0x1p-900 && std::isfinite(plain);
    const double scaled = std::sqrt(oracle::sum_squares(tensors, std::ldexp(1.0, -exponent)));
    const double expected = safe ? std::sqrt(plain) : std::ldexp(scaled, exponent);
    for (int threads : {1, 3}) {
      Call call(tensors);
      call.call.measure_norm = call.call.skip_nonfinite = true;
      call.call.num_threads = threads;
      call.run();
      check(same(call.norms[0], expected) && !call.outcome.skipped &&
                call.outcome.first_nonfinite == -1,
            "second look " + isa + " " + std::to_string(magnitude));
    }
  }
}

void check_norms_and_clips() {
  const Buffers all = gradients(f32, {100, 200, 300, 40000});
  std::vector<Tensor> tensors = tensors_of(all);
  for (std::size_t t = 0; t < 4; ++t) tensors[t].scope = tensors[t].row = t < 2 ? 0 : 1;
  const double first = std::sqrt(oracle::sum_squares({tensors[0], tensors[1]}));
  const double second = std::sqrt(oracle::sum_squares({tensors[2], tensors[3]}));
  const double both = std::sqrt(oracle::sum_squares(tensors));
  const auto run = [&](bool joint, double scale) {
    Call call(tensors);
    call.rows.push_back(call.rows[0]);
    call.rows[0].clip_norm = call.rows[1].clip_norm = 5.0;
    call.scales = {1.0, scale};
    call.call.joint = joint;
    call.call.measure_norm = true;
    call.run();
    check(call.clips[0] == 5.0 / call.norms[0] && call.clips[1] == 5.0 / call.norms[1],
          "clip coefficients");
    return call.norms;
  };
  check(run(true, 1.0) == std::vector<double>{both, both}, "joint norm of equal scales");
  check(run(false, 2.0) == std::vector<double>{first, 2.0 * second}, "separate norms");
  const double weighted = std::sqrt(first * first + (2.0 * second) * (2.0 * second));
  check(run(true, 2.0) == std::vector<double>{weighted, weighted},
        "joint norm of different scales");

  Call given(tensors);
  const double norm = 50.0;
  given.rows[0].clip_norm = 10.0;
  given.rows.push_back(given.rows[0]);
  given.rows[1].clip_norm = HUGE_VAL;
  given.call.given_norms = &norm;
  given.run();
  check(given.clips == std::vector<double>{0.2, 1.0} && given.norms[0] == norm, "given norm");
}

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

void check_environment(const std::string& isa) {
  Buffers expected = make({f32, f32, f32}, {100003, 100003}, 1);
  for (TensorBuffers& one : expected) one.grad.fill(1e-38);
  for (TensorBuffers& one : expected) one.param.fill(1e-38);
  Buffers got = expected;
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
    Buffers once = got;
    std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
    const unsigned control = __builtin_ia32_stmxcsr();
#endif
    const double flushed = step(once, threads);
#if defined(__x86_64__)
    const bool restored = control == __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1f80);
#else
    const bool restored = true;
#endif
    const bool direction = std::fegetround() == FE_UPWARD || restored;
    std::fesetround(FE_TONEAREST);
    check(restored && direction, "environment restored " + isa);
    check(same(norm, flushed) && difference(once, expected).empty(), "environment " + isa);
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
  check_conversions();
  check_rules(Rules{});
  check_block_scales();
  check_staging();
  check_norms_and_clips();
  for_each_isa([](const std::string& isa) {
    check_kernel_conversions(isa);
    check_norm_tree(isa);
    check_second_look(isa);
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
  const bool only_threads = argc > 1 && std::string(argv[1]) == "threads";
  if (!only_threads) check_all();
  check_shares();
  check_concurrent_steps();
  if (only_threads) check_second_look("default");
  std::printf("%ld passed, %ld failed\n", passed, failed);
  return failed > 0;
}
