// Conformance of the CPU kernels without Python, for sanitizers and new machines: every rule,
// storage and instruction set, the conversions and the norm tree, bit for bit against oracle.hpp.
// Prints "N passed, M failed"; the exit status is 1 if M > 0.

#include <type_traits>

#include "checks.hpp"
#include "core/float16.hpp"
#include "core/norm_tree.hpp"
#include "oracle.hpp"

namespace {

using namespace checks;

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

// wd, c1, b1, c2, b2, G, M, R, S, eps, D
std::vector<std::vector<double>> coefficient_sets(NAdam) {
  return {{0.037, 0.1, 0.0, 0.02, 0.0, 0.13, 0.87, 1.7, -0.11, 1e-3, 0.043},
          {0.0, 0.1, 0.0, 0.001, 0.0, 0.13, 0.87, 31.6, -0.002, 1e-8, 0.0},
          {0.0, 0.0, 0.3, 0.0, 0.2, 0.4, 0.5, 1.1, -0.11, 1e-8, 0.04},
          {0.01, 0.0, 0.0, 0.0, 0.0, 0.7, 0.0, 1.0, -0.11, 0.1, 0.0},
          {0.0, 0.3, 0.0, 0.0, 0.4, 0.0, 0.9, 1.3, -0.11, 0.0, 0.0},
          {0.037, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, -0.8, 0.9, 0.05},
          std::vector<double>(11, 0.0)};
}
// wd, c1, b1, c2, b2, R, S, eps, D
std::vector<std::vector<double>> coefficient_sets(Adam) {
  return {{0.037, 0.1, 0.0, 0.02, 0.0, 1.7, -0.11, 1e-3, 0.043},
          {0.0, 0.1, 0.0, 0.001, 0.0, 31.6, -0.01, 1e-8, 0.0},
          {0.0, 0.0, 0.3, 0.0, 0.2, 1.1, -0.11, 1e-8, 0.04},
          {0.01, 0.0, 0.0, 0.0, 0.0, 1.0, -0.11, 0.1, 0.0},
          {0.0, 0.3, 0.0, 0.0, 0.4, 1.3, -0.11, 0.0, 0.0},
          {0.037, 0.1, 0.2, 0.3, 0.4, 0.5, -0.6, 0.7, 0.08},
          std::vector<double>(9, 0.0)};
}
// wd, c, b, A, N1, N2, S, eps, D, E
std::vector<std::vector<double>> coefficient_sets(RmspropFormula) {
  return {{0.037, 0.02, 0.0, 0.8, 0.7, 0.9, -0.11, 1e-3, 0.043, 0.0},
          {0.0, 0.01, 0.0, 0.9, 1.0, 0.0, -0.01, 1e-8, 0.0, 0.0},
          {0.0, 0.01, 0.0, 0.9, 0.95, 1.0, -0.01, 1e-8, 0.04, 1e-8},
          {0.01, 0.0, 0.3, 0.0, 1.0, 0.0, -0.11, 0.1, 0.0, 0.0},
          {0.0, 0.0, 0.0, 0.9, 0.0, 0.7, -0.11, 0.0, 0.0, 1e-3},
          {0.037, 0.1, 0.2, 0.3, 0.4, 0.5, -0.6, 0.7, 0.08, 0.9},
          std::vector<double>(10, 0.0)};
}
std::vector<std::vector<double>> coefficient_sets(Accumulate) {
  return {{0.83, 0.61}, {1.0, 1.0}, {0.0, 0.5}, {0.7, 0.0}, {0.0, 0.0}};
}

/// Around the borders of registers and blocks.
std::vector<std::int64_t> small_sizes() {
  std::vector<std::int64_t> sizes;
  for (std::int64_t n = 1; n <= 3 * 16 + 5; ++n) sizes.push_back(n);
  for (std::int64_t n : {block_size - 1, block_size, block_size + 1}) sizes.push_back(n);
  return sizes;
}

/// Around all borders, and enough elements for several threads.
std::vector<std::int64_t> border_sizes() {
  std::vector<std::int64_t> sizes = small_sizes();
  for (std::int64_t border : {std::int64_t{norm_tree::tile_size}, chunk_size})
    for (std::int64_t n : {border - 1, border, border + 1}) sizes.push_back(n);
  sizes.insert(sizes.end(), {2 * chunk_size + 1, 100003});
  return sizes;
}

/// Chunks are cut and shared out without looking at the rule: one rule stands for all.
template <class Rule>
std::vector<std::int64_t> sizes_for() {
  std::vector<std::int64_t> sizes = small_sizes();
  sizes.push_back(chunk_size + 1);
  return std::is_same_v<Rule, Momentum> ? border_sizes() : sizes;
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

/// Infinities, NaN and zeros of both signs among the gradients and states, each at other places.
void add_special_values(Buffers& all) {
  const double special[] = {HUGE_VAL, -HUGE_VAL, NAN, 0.0, -0.0, 1e-42, -1e-42};
  const auto add = [&](Buffer& buffer, std::int64_t first) {
    for (std::size_t k = 0; k < std::size(special); ++k) {
      const std::int64_t i = first + static_cast<std::int64_t>(k) * 5;
      if (i < buffer.numel() && buffer.dtype() != int8)
        oracle::put(buffer.dtype(), buffer.data(), i, special[k]);
    }
  };
  for (TensorBuffers& one : all) {
    add(one.grad, 0);
    for (int s = 0; s < max_slots; ++s) add(one.state[s], s + 1);
  }
}

/// Averages of squares are not negative. (Before special values: -inf must do no harm either.)
template <class Rule>
void make_squares_positive(Buffers& all) {
  for (int s = 0; s < num_slots<Rule>; ++s)
    if (std::strstr(Rule::slots[s], "sq"))
      for (TensorBuffers& one : all) {
        one.state[s].make_positive();
        one.scales[s].make_positive();
      }
}

template <class Rule>
void check_rule(int index) {
  constexpr int steps = 3;
  int turn = 0;
  for (const Storage& storage : storages) {
    auto sizes = sizes_for<Rule>();  // for the first set of coefficients, which has all terms
    for (const std::vector<double>& k : coefficient_sets(Rule{})) {
      Buffers before = make(storage, sizes, num_slots<Rule>);
      sizes = small_sizes();
      make_squares_positive<Rule>(before);
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

/// `prepare`: the forms of SGD as frameworks print them, in double, over a first and later steps.
void check_forms() {
  constexpr double lr = 0.1, mu = 0.9, next = 0.95, wd = 0.05;
  for (int form = 0; form < 8; ++form) {
    const bool nesterov = form & 1, inside = form & 2, decoupled = form & 4;
    const double damp = nesterov ? 0.0 : 0.3, unit = inside ? -lr : 1.0;
    double p = 2.0, v = 0.0, kernel_p = p, kernel_v = v;
    for (int step = 1; step <= 4; ++step) {
      const double raw = 1.5 / step, g = decoupled ? raw : raw + wd * p;
      const double gain = step == 1 ? 1.0 : 1.0 - damp;
      v = mu * v + unit * gain * g;
      const double d = nesterov ? next * v + unit * gain * g : v;
      p = (decoupled ? p - lr * wd * p : p) + (inside ? d : -lr * d);

      Tensor tensor{};
      tensor.param = &kernel_p;
      tensor.grad = &raw;
      tensor.slots[0] = {&kernel_v, nullptr, f64};
      tensor.numel = 1;
      tensor.param_dtype = tensor.grad_dtype = f64;
      Call call({tensor});
      const double hyper[] = {lr, mu, next, damp, wd, 1.0 * nesterov, 1.0 * inside, 1.0 * decoupled,
                              0.0};
      call.rows[0].rule = 1;
      call.rows[0].coefficients_given = false;
      call.rows[0].progress = {step, step == 1};
      std::copy(std::begin(hyper), std::end(hyper), call.rows[0].hyper);
      call.run();
    }
    const bool right = std::fabs(kernel_p - p) < 1e-14 && std::fabs(kernel_v - v) < 1e-14;
    check(right, "form " + std::to_string(form));
  }
}

template <class... All>
void check_rules(RuleList<All...>) {
  int index = 0;
  (check_rule<All>(index++), ...);
}

// --- the norm tree ----------------------------------------------------------------------------

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

}  // namespace

int main() {
  check_conversions();
  check_rules(Rules{});
  check_block_scales();
  check_forms();
  for_each_isa([](const std::string& isa) {
    check_kernel_conversions(isa);
    check_norm_tree(isa);
  });
  return report();
}
