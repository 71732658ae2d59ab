// Checks of norms without Python: of scopes and of tensors, the second look, clip coefficients,
// steps that a norm refuses, chunk sums that are known or left behind. `check_norms threads` runs
// only what is for ThreadSanitizer. Prints "N passed, M failed"; the exit status is 1 if M > 0.

#include <cstdlib>

#include "checks.hpp"
#include "oracle.hpp"

namespace {

using namespace checks;

constexpr int sgd = 0;
const double descent[] = {0.0, -1.0, 0.0};  // p <- p - g

double norm_of(const std::vector<Tensor>& tensors) {
  return std::sqrt(oracle::sum_squares(tensors));
}

void update(const Tensor& tensor, double scale) {
  if (tensor.param_dtype == f64)
    oracle::update<Sgd, double>(tensor, descent, scale, HUGE_VAL);
  else
    oracle::update<Sgd, float>(tensor, descent, scale, HUGE_VAL);
}

/// A call that measures and descends, all tensors in one scope.
Call descending(const Buffers& all, int threads) {
  Call call(tensors_of(all));
  call.rows[0].rule = sgd;
  std::copy(std::begin(descent), std::end(descent), call.rows[0].hyper);
  call.call.measure_norm = true;
  call.call.num_threads = threads;
  return call;
}

// --- the second look --------------------------------------------------------------------------

/// The exponent that float64 gradients are scaled by: 0 if no second look is needed.
int second_look_exponent(const std::vector<Tensor>& tensors) {
  const double plain = oracle::sum_squares(tensors);
  if (plain >= 0x1p-900 && std::isfinite(plain)) return 0;
  double largest = 0;
  for (const Tensor& tensor : tensors)
    for (std::int64_t i = 0; i < tensor.numel; ++i)
      largest = std::max(largest, std::fabs(oracle::get(f64, tensor.grad, i)));
  return std::clamp(std::ilogb(largest), -1000, 1000);
}

double scaled_norm(const std::vector<Tensor>& tensors, int exponent) {
  const double sum = oracle::sum_squares(tensors, std::ldexp(1.0, -exponent));
  return std::ldexp(std::sqrt(sum), exponent);
}

void check_second_look(const std::string& isa) {
  for (double magnitude : {1e-320, 1e-200, 1e-140, 1.0, 1e160, 1e300}) {
    const Buffers all = gradients(f64, {7, 20000, 200000}, magnitude);
    const int exponent = second_look_exponent(tensors_of(all));
    for (int threads : {1, 3}) {
      Call call(tensors_of(all));
      call.call.measure_norm = call.call.skip_nonfinite = true;
      call.call.num_threads = threads;
      call.run();
      bool right = same(call.norms[0], scaled_norm(call.tensors, exponent)) &&
                   call.outcome.norm == call.norms[0];
      for (std::size_t t = 0; t < all.size(); ++t)
        right = right && same(call.tensor_norms[t], scaled_norm({call.tensors[t]}, exponent));
      check(right && !call.outcome.skipped && !call.outcome.nonfinite &&
                call.outcome.first_nonfinite == -1,
            "second look " + isa + " " + std::to_string(magnitude));
    }
  }
}

// --- scopes -----------------------------------------------------------------------------------

void check_joint_norms() {
  const Buffers all = gradients(f32, {100, 200, 300, 40000});
  std::vector<Tensor> tensors = tensors_of(all);
  for (std::size_t t = 0; t < 4; ++t) tensors[t].scope = tensors[t].row = t < 2 ? 0 : 1;
  const double first = norm_of({tensors[0], tensors[1]});
  const double second = norm_of({tensors[2], tensors[3]});
  const auto run = [&](double scale) {
    Call call(tensors);
    call.rows.push_back(call.rows[0]);
    call.rows[0].clip_norm = call.rows[1].clip_norm = 5.0;
    call.scales = {1.0, scale};
    call.call.measure_norm = true;
    call.run();
    const double clip = 5.0 / call.norms[0];
    check(call.clips == std::vector<double>{clip, clip}, "joint clip coefficients");
    check(call.outcome.norm == call.norms[0], "joint norm of all");
    for (std::size_t t = 0; t < 4; ++t)
      check(call.tensor_norms[t] == call.scales[t / 2] * norm_of({tensors[t]}),
            "tensor norm of a joint scope");
    return call.norms;
  };
  const double both = norm_of(tensors);
  check(run(1.0) == std::vector<double>{both, both}, "joint norm of equal scales");
  const double weighted = std::sqrt(first * first + (2.0 * second) * (2.0 * second));
  check(run(2.0) == std::vector<double>{weighted, weighted}, "joint norm of different scales");
}

/// Scope 0 is clipped, 1 has two rows of which one is not clipped, 2 is empty, 3 needs a second
/// look and 4 is within its limit.
struct Scoped {
  Buffers all = gradients(f32, {100, 20000, 300, 150000, 12000});
  std::vector<std::uint32_t> scopes{0, 0, 1, 1, 3, 4}, rows{0, 0, 1, 2, 3, 4};
  std::vector<double> scales{1.0, 3.7, 2.0, 0.3, 1.0};
  double clip_norms[5] = {5.0, 0.7, HUGE_VAL, 1e-199, 1e6};

  Scoped() { all.insert(all.begin() + 4, gradients(f64, {17000}, 1e-200)[0]); }

  Call call(int threads) const {
    Call scoped = descending(all, threads);
    for (std::size_t t = 0; t < all.size(); ++t) {
      scoped.tensors[t].scope = scopes[t];
      scoped.tensors[t].row = rows[t];
    }
    scoped.rows.assign(5, scoped.rows[0]);
    const std::size_t scope_of_row[] = {0, 1, 1, 3, 4};
    for (std::size_t r = 0; r < 5; ++r) {
      scoped.rows[r].clip_norm = clip_norms[r];
      scoped.rows[r].rescale_grad = scales[scope_of_row[r]];
    }
    scoped.rows[2].sign = -1.0;
    scoped.scales = scales;
    scoped.call.joint = false;
    return scoped;
  }
};

void check_scopes(const std::string& isa) {
  const Scoped before;
  const auto t = tensors_of(before.all);
  const double wide = scaled_norm({t[4]}, second_look_exponent({t[4]}));
  const std::vector<double> norms = {norm_of({t[0], t[1]}), 3.7 * norm_of({t[2], t[3]}), 0.0,
                                     0.3 * wide, norm_of({t[5]})};
  const std::vector<double> clips = {5.0 / norms[0], 0.7 / norms[1], 1.0, 1e-199 / norms[3], 1.0};
  const double total = std::sqrt(norms[0] * norms[0] + norms[1] * norms[1] + norms[4] * norms[4]);
  Scoped expected = before;
  for (std::size_t i = 0; i < t.size(); ++i) {
    const std::uint32_t row = before.rows[i];
    const double sign = row == 2 ? -1.0 : 1.0, scale = before.scales[before.scopes[i]];
    update(expected.all[i].tensor(), sign * scale * clips[row]);
  }
  check(norms[3] > 1e-199 && clips[0] < 1 && norms[4] < 1e6, "scopes are what they should be");
  for (int threads : {1, 3}) {
    Scoped got = before;
    Call call = got.call(threads);
    call.run();
    check(call.norms == norms && call.outcome.norm == total, "norm per scope " + isa);
    check(call.clips == clips, "clip per scope " + isa);
    check(!call.outcome.nonfinite && !call.outcome.skipped, "scopes are finite " + isa);
    check(difference(got.all, expected.all).empty(),
          "step per scope " + isa + difference(got.all, expected.all));
  }
}

/// One norm per scope that the caller knows, and the norm of all, which must not leave the range.
void check_given_norms() {
  const Buffers all = gradients(f32, {100, 200});
  struct Case {
    double first, second, total;
  };
  for (const Case& c : {Case{3, 4, 5},
                        {0x3p600, 0x4p600, 0x5p600},
                        {0x3p-600, 0x4p-600, 0x5p-600},
                        {0, 0, 0},
                        {HUGE_VAL, 1, HUGE_VAL},
                        {1, NAN, NAN},
                        {NAN, 1, NAN}}) {
    Call call(tensors_of(all));
    call.tensors[1].scope = call.tensors[1].row = 1;
    call.rows[0].clip_norm = 1.0;
    call.rows.push_back(call.rows[0]);
    call.scales = {2.0, 1.0};
    call.call.joint = false;
    const double given[] = {c.first / 2, c.second};
    call.call.given_norms = given;
    call.run();
    check(same(call.norms[0], c.first) && same(call.norms[1], c.second), "given norms");
    check(same(call.outcome.norm, c.total), "norm of all given norms");
    check(call.outcome.nonfinite == !std::isfinite(c.total) && !call.outcome.skipped &&
              call.outcome.first_nonfinite == -1,
          "given norms are judged");
    for (std::size_t k = 0; k < 2; ++k)
      check(same(call.clips[k], call.norms[k] <= 1 ? 1.0 : 1 / call.norms[k]), "given clip");
  }
  Call joint(tensors_of(all));
  const double norm = 50.0;
  joint.rows[0].clip_norm = 10.0;
  joint.rows.push_back(joint.rows[0]);
  joint.rows[1].clip_norm = HUGE_VAL;
  joint.call.given_norms = &norm;
  joint.run();
  check(joint.clips == std::vector<double>{0.2, 1.0} && joint.norms[0] == norm, "given norm");
  check(joint.outcome.norm == norm && joint.tensor_norms == std::vector<double>{-1.0, -1.0},
        "a given norm measures nothing");
}

// --- norms of tensors -------------------------------------------------------------------------

void check_tensor_norms(const std::string& isa) {
  const std::vector<std::int64_t> sizes = {1, 16384, 16385, 3, 100000, 40000, 17};
  for (DType dtype : {f64, f32, f16_, bf16_}) {
    const Buffers all = gradients(dtype, sizes);
    for (bool joint : {true, false})
      for (int threads : {1, 3}) {
        Call call(tensors_of(all));
        call.rows.push_back(call.rows[0]);
        for (std::size_t t = 4; t < sizes.size(); ++t)
          call.tensors[t].scope = call.tensors[t].row = 1;
        call.scales = {1.0, 3.7};
        call.call.joint = joint;
        call.call.measure_norm = true;
        call.call.num_threads = threads;
        call.run();
        for (std::size_t t = 0; t < sizes.size(); ++t) {
          const double norm = std::sqrt(cpu::sum_squares(&call.tensors[t], 1, 1));
          check(call.tensor_norms[t] == (t < 4 ? norm : 3.7 * norm),
                "tensor norm " + isa + " " + name_of(dtype) + " " + std::to_string(sizes[t]));
        }
        call.wants_tensor_norms = false;
        call.run();
        check(call.tensor_norms == std::vector<double>(sizes.size(), -1.0), "no tensor norms");
      }
  }
}

// --- steps that a norm refuses ----------------------------------------------------------------

/// What came of a step that skips above `limit`: skipped and nothing written, or the other way.
void check_refusal(const std::string& what, Call call, double limit, bool expected) {
  Buffers before;  // the tensors' parameters
  for (const Tensor& tensor : call.tensors) {
    before.emplace_back(Storage{tensor.param_dtype, tensor.param_dtype, f32}, tensor.numel, 0, 0);
    std::memcpy(before.back().param.data(), tensor.param, before.back().param.nbytes());
  }
  call.call.skip_norm = limit;
  call.run();
  bool written = false;
  for (std::size_t t = 0; t < call.tensors.size(); ++t)
    written |=
        std::memcmp(before[t].param.data(), call.tensors[t].param, before[t].param.nbytes()) != 0;
  check(call.outcome.skipped == expected && written == !expected,
        "skip_norm: " + what + " against " + std::to_string(limit));
}

void check_skip_norm() {
  Buffers all = gradients(f32, {300, 150000});
  const double norm = norm_of(tensors_of(all));
  for (int threads : {1, 3}) {
    const auto refusal = [&](const std::string& what, double limit, bool expected) {
      check_refusal(what, descending(all, threads), limit, expected);
    };
    refusal("a norm at the limit", norm, false);
    refusal("a norm above the limit", std::nextafter(norm, 0.0), true);
    refusal("no limit", HUGE_VAL, false);
    refusal("nothing allowed", 0.0, true);
    for (double bad : {HUGE_VAL, double{NAN}}) {
      const double good = oracle::get(f32, all[1].grad.data(), 77777);
      oracle::put(f32, all[1].grad.data(), 77777, bad);
      refusal("a bad norm", 1e300, true);
      refusal("a bad norm without limit", HUGE_VAL, false);
      oracle::put(f32, all[1].grad.data(), 77777, good);
    }
  }
  Call unknown = descending(all, 1);
  unknown.call.measure_norm = false;
  check_refusal("an unknown norm", unknown, 0.0, false);

  for (double bad : {5.0, double{NAN}}) {
    Call given = unknown;
    given.call.given_norms = &bad;
    check_refusal("a given norm", given, 5.0, std::isnan(bad));
    check_refusal("a given norm above", given, 4.999, true);
  }
  Call scopes = unknown;
  const double norms[] = {3.0, 4.0};
  scopes.scales = {1.0, 1.0};
  scopes.rows.push_back(scopes.rows[0]);
  scopes.tensors[1].scope = scopes.tensors[1].row = 1;
  scopes.call.joint = false;
  scopes.call.given_norms = norms;
  check_refusal("the norm of all scopes", scopes, 5.0, false);
  check_refusal("the norm of all scopes above", scopes, 4.999, true);
}

// --- chunk sums -------------------------------------------------------------------------------

using Sums = std::vector<std::vector<double>>;

std::vector<double> chunk_sums(const Buffer& buffer) {
  std::vector<double> sums;
  for (std::int64_t begin = 0; begin < buffer.numel(); begin += chunk_size) {
    Tensor part{};
    part.grad = static_cast<const char*>(buffer.data()) +
                begin * static_cast<std::int64_t>(size_of(buffer.dtype()));
    part.grad_dtype = buffer.dtype();
    part.numel = std::min(chunk_size, buffer.numel() - begin);
    sums.push_back(oracle::sum_squares({part}));
  }
  return sums;
}

void attach(Call& call, StepCall::Sums what, Sums& sums) {
  call.call.sums = what;
  for (std::size_t t = 0; t < call.tensors.size(); ++t) call.tensors[t].chunk_sums = sums[t].data();
}

/// A step leaves the sums over what it wrote, as it is stored.
void check_sums_of_results(const std::string& isa) {
  for (const Storage& storage : {Storage{f64, f64, f64},
                                 {f32, f32, f32},
                                 {f32, bf16_, f32},
                                 {f16_, f16_, f32},
                                 {bf16_, f32, f32}})
    for (bool measure : {false, true})
      for (int threads : {1, 2, 3}) {
        const Buffers all = make(storage, {5, 16384, 16385, 120003}, 0);
        Sums sums, expected;
        for (const TensorBuffers& one : all) sums.emplace_back(chunk_sums(one.param).size(), -1.0);
        Call call = descending(all, threads);
        call.call.measure_norm = measure;
        attach(call, StepCall::Sums::of_results, sums);
        call.run();
        for (const TensorBuffers& one : all) expected.push_back(chunk_sums(one.param));
        check(sums == expected, "sums of results " + isa + " " + name(storage));
      }
}

/// Known sums give the step that measuring gives; `bad` stands among the gradients if not 0.
void check_known_sums(const std::string& isa, DType dtype, double magnitude, double bad) {
  Buffers before = gradients(dtype, {7, 40000, 16384, 150000}, magnitude);
  if (bad != 0) oracle::put(dtype, before[2].grad.data(), 16383, bad);
  Sums sums;
  for (const TensorBuffers& one : before) sums.push_back(chunk_sums(one.grad));
  Buffers expected = before;
  Call measured = descending(expected, 1);
  measured.rows[0].clip_norm = magnitude;
  measured.run();
  check(measured.outcome.first_nonfinite == (bad != 0 ? 2 : -1), "first non-finite tensor");
  for (int threads : {1, 3}) {
    Buffers got = before;
    Call known = descending(got, threads);
    known.rows[0].clip_norm = magnitude;
    attach(known, StepCall::Sums::of_gradients, sums);
    known.run();
    bool right = difference(got, expected).empty() && same(known.norms[0], measured.norms[0]) &&
                 same(known.outcome.norm, measured.outcome.norm) &&
                 same(known.clips[0], measured.clips[0]) && known.outcome.nonfinite == (bad != 0) &&
                 known.outcome.first_nonfinite == measured.outcome.first_nonfinite;
    for (std::size_t t = 0; t < got.size(); ++t)
      right = right && same(known.tensor_norms[t], measured.tensor_norms[t]);
    check(right, "known sums " + isa + " " + name_of(dtype) + " " + std::to_string(magnitude));
  }
}

void check_sums_of_gradients(const std::string& isa) {
  for (DType dtype : {f32, f64}) {
    check_known_sums(isa, dtype, 1.0, 0.0);
    for (double bad : {HUGE_VAL, -HUGE_VAL, double{NAN}}) check_known_sums(isa, dtype, 1.0, bad);
  }
  for (double magnitude : {1e-310, 1e-200, 1e160, 1e300}) {
    check_known_sums(isa, f64, magnitude, 0.0);
    check_known_sums(isa, f64, magnitude, HUGE_VAL);
  }
  // They are believed: nothing is read for the norm.
  const Buffers all = gradients(f32, {40000});
  Sums sums{chunk_sums(all[0].grad)};
  for (double& sum : sums[0]) sum *= 4.0;
  Call call = descending(all, 1);
  attach(call, StepCall::Sums::of_gradients, sums);
  const double norm = norm_of(call.tensors);
  call.run();
  check(call.norms[0] == 2.0 * norm && call.tensor_norms[0] == 2.0 * norm, "sums are believed");
}

void check_all() {
  check_joint_norms();
  check_given_norms();
  check_skip_norm();
  for_each_isa([](const std::string& isa) {
    check_second_look(isa);
    check_scopes(isa);
    check_tensor_norms(isa);
    check_sums_of_results(isa);
    check_sums_of_gradients(isa);
  });
}

}  // namespace

int main(int argc, char** argv) {
  // ThreadSanitizer knows our own threads, but not an OpenMP runtime's.
  setenv("FUSEDSTEP_THREADS_RUNTIME", "own", 1);
  if (argc > 1 && std::string(argv[1]) == "threads") {
    check_second_look("default");
    check_scopes("default");
    check_skip_norm();
    check_sums_of_results("default");
    check_known_sums("default", f64, 1e-200, 0.0);
  } else {
    check_all();
  }
  return report();
}
