// Steps of the CUDA backend, executed by the emulator, against those of the CPU: the same bits in
// every buffer, norm and count, for every rule and storage, sizes and alignments around every
// border. Prints "N passed, M failed"; the exit status is 1 if M > 0. `check_steps few` runs less;
// `check_steps races` what ThreadSanitizer has to see, for which one case of a kind is enough.

#include <cmath>
#include <cstring>
#include <limits>
#include <set>

#include "checks.hpp"
#include "cuda/api.hpp"
#include "cuda/pack.hpp"
#include "cuda/update.hpp"
#include "emulator.h"

namespace {

using namespace checks;

bool few = false, races = false;

// --- running one call on both -----------------------------------------------------------------

/// Declares the memory of buffers to be the device's while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Buffers& all) {
    for (const TensorBuffers& one : all) {
      add(one.param);
      add(one.grad);
      add(one.copy);
      for (int k = 0; k < max_slots; ++k) {
        add(one.state[k]);
        add(one.scales[k]);
      }
    }
  }
  ~OnDevice() {
    for (const void* memory : memory_) emulator_unregister(memory);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  void add(const Buffer& buffer) {
    if (buffer.numel() == 0) return;
    emulator_register(buffer.data(), static_cast<std::int64_t>(buffer.nbytes()), 0);
    memory_.push_back(buffer.data());
  }
  std::vector<const void*> memory_;
};

struct DeviceOutcome {
  DeviceReport report{};
  std::vector<double> tensor_norms;
};

/// A step of the device with the same arguments as `call`, which has run on the CPU.
DeviceOutcome run_on_device(const Call& call, std::vector<Tensor> tensors) {
  const DeviceApi& api = cuda::device_api();
  DeviceCall device{};
  device.step = call.call;
  device.step.tensors = tensors.data();
  device.step.rows = call.rows.data();
  device.step.scope_scale = call.scales.data();
  std::vector<std::uint32_t> scope_rows(call.scales.size(), 0);
  for (const Tensor& tensor : tensors) scope_rows[tensor.scope] = tensor.row;
  device.scope_rows = scope_rows.data();
  static void* workspace = nullptr;
  if (!workspace) check(!api.make_workspace(0, &workspace), "make_workspace");
  void* report = nullptr;
  const char* why = api.step(workspace, &device, &report);
  check(!why,
        std::string("step: ") + (why ? why : "") + (emulator_fault() ? emulator_fault() : ""));
  DeviceOutcome outcome;
  outcome.tensor_norms.assign(tensors.size(), -1.0);
  if (!report) return outcome;
  why = api.read_report(report, device.stream, &outcome.report,
                        call.call.measure_norm ? outcome.tensor_norms.data() : nullptr);
  check(!why, std::string("read_report: ") + (why ? why : ""));
  api.free_report(report);
  return outcome;
}

double smallest_clip(const Call& call) {
  double clip = 1.0;
  for (const Tensor& tensor : call.tensors)
    clip = smaller_coefficient(clip, call.outcome.clip_coefs[tensor.row]);
  return clip;
}

/// Whether to leave out a case because it differs in values and places alone from one before.
bool is_known_kind(const std::string& what) {
  static std::set<std::string> seen;
  return races && !seen.insert(what).second;
}

/// `all` on the CPU and a copy of it on the device. `edit` completes a call.
template <class Edit>
void compare(const Buffers& all, const std::string& what, Edit edit) {
  if (is_known_kind(what)) return;
  Buffers on_cpu = all, on_device = all;
  Call call(tensors_of(on_cpu));
  edit(call);
  for (const Tensor& tensor : call.tensors)
    call.scales[tensor.scope] = std::fabs(call.rows[tensor.row].rescale_grad);
  call.run();
  std::vector<Tensor> tensors = tensors_of(on_device);
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    tensors[t].row = call.tensors[t].row;
    tensors[t].scope = call.tensors[t].scope;
    tensors[t].layout = call.tensors[t].layout;
    if (tensors[t].layout) tensors[t].grad = call.tensors[t].grad;
  }
  const OnDevice registered(on_device);
  const DeviceOutcome outcome = run_on_device(call, tensors);
  const std::string text = difference(on_device, on_cpu);
  check(text.empty(), what + text);
  check(outcome.report.skipped == call.outcome.skipped, what + " skipped");
  check(same(outcome.report.clip_coef, smallest_clip(call)), what + " clip_coef");
  if (call.call.measure_norm || call.call.given_norms)
    check(same(outcome.report.norm, call.outcome.norm), what + " norm");
  if (!call.call.measure_norm) return;
  check(outcome.report.nonfinite == call.outcome.nonfinite, what + " nonfinite");
  check(outcome.report.first_nonfinite == call.outcome.first_nonfinite, what + " first_nonfinite");
  for (std::size_t t = 0; t < tensors.size(); ++t)
    check(same(outcome.tensor_norms[t], call.tensor_norms[t]), what + " tensor_norms");
}

// --- rules x storage --------------------------------------------------------------------------

struct RuleCase {
  std::string name;
  int rule, slots;
  std::vector<double> hypers;
};

double ordinary(const std::string& hyper) {
  const std::pair<const char*, double> values[] = {
      {"lr", 0.07},       {"weight_decay", 0.013}, {"momentum", 0.9}, {"next_momentum", 0.93},
      {"dampening", 0.1}, {"beta1", 0.9},          {"beta2", 0.99},   {"next_beta1", 0.91},
      {"eps", 1e-8},      {"alpha", 0.98},         {"nesterov", 1.0}, {"momentum_decay", 0.004},
      {"keep", 0.75},     {"scale", 0.5}};
  for (const auto& [name, value] : values)
    if (hyper == name) return value;
  return 0.0;
}

template <class... All>
std::vector<RuleCase> rule_cases(RuleList<All...> /*rules*/) {
  int index = 0;
  std::vector<RuleCase> cases;
  const auto add = [&](auto tag) {
    using Rule = typename decltype(tag)::type;
    RuleCase one{Rule::name, index++, num_slots<Rule>, {}};
    for (const char* hyper : Rule::hypers) one.hypers.push_back(ordinary(hyper));
    cases.push_back(one);
  };
  (add(cuda::Tag<All>{}), ...);
  return cases;
}

void set_row(Row& row, const RuleCase& rule, std::int64_t step) {
  row.rule = rule.rule;
  row.coefficients_given = false;
  row.progress = {step, step == 1, step == 1 ? 1.0 : 0.4};
  row.rescale_grad = 0.5;
  row.sign = 1.0;
  row.clip_norm = row.clip_value = HUGE_VAL;
  std::copy(rule.hypers.begin(), rule.hypers.end(), row.hyper);
}

Buffers positive(Buffers all) {  // averages of squares are
  for (TensorBuffers& one : all)
    for (Buffer& state : one.state) state.make_positive();
  return all;
}

void check_rules() {
  const std::vector<std::int64_t> sizes =
      few ? std::vector<std::int64_t>{1, 5, 131, 16384 + 7}
          : std::vector<std::int64_t>{1,   2,        3,    4,     5,     7,     8,
                                      33,  127,      130,  255,   256,   257,   512,
                                      515, 1024 + 3, 4099, 16383, 16384, 16385, 2 * 16384 + 9};
  for (const RuleCase& rule : rule_cases(Rules{}))
    for (const Storage& storage : storages) {
      if (races && rule.name != "momentum" && &storage != &storages[1]) continue;
      const Buffers all = positive(make(storage, sizes, rule.slots));
      for (const bool clips : {false, true})
        compare(all, rule.name + " " + name(storage) + (clips ? " clips" : ""), [&](Call& call) {
          set_row(call.rows[0], rule, clips ? 3 : 1);
          if (clips) call.rows[0].clip_norm = call.rows[0].clip_value = 0.7;
          call.call.measure_norm = clips;
        });
    }
}

/// All places within 16 bytes, of buffers that agree about it and of such that do not.
void check_alignment() {
  const RuleCase momentum = rule_cases(Rules{})[1];
  for (const Storage& storage :
       {storages[0], storages[1], storages[10], storages[14], storages[22]})
    for (int offset = 0; offset < 9; ++offset)
      for (const int other : {offset, 0, 1, 3}) {
        Buffers all;
        for (const std::int64_t numel : {1, 3, 6, 40, 700, 16384 + 21}) {
          all.emplace_back(storage, numel, 1, offset);
          const auto place = [&](Buffer& buffer) {
            const DType dtype = buffer.dtype();
            buffer = Buffer(dtype, numel, other);
            buffer.fill(1.0);
          };
          place(all.back().grad);
          if (other == offset) place(all.back().state[0]);
        }
        const std::string kind = offset % 2 ? (other == offset ? " odd" : " mixed") : "";
        compare(all, "alignment " + name(storage) + kind, [&](Call& call) {
          set_row(call.rows[0], momentum, 2);
          call.rows[0].clip_norm = 0.1;
          call.call.measure_norm = true;
        });
      }
}

// --- norms ------------------------------------------------------------------------------------

void check_norms() {
  const std::vector<std::vector<std::int64_t>> lists = {
      {1},
      {31, 32, 33},
      {1023, 1024, 1025},
      {16383, 16384, 16385, 5 * 16384},
      {40000, 3, 70001},
      std::vector<std::int64_t>(1500, 3),
      std::vector<std::int64_t>(few ? 1030 : 3100, 1)};
  for (DType dtype : {f32, f64, f16_, bf16_})
    for (const auto& sizes : lists)
      compare(gradients(dtype, sizes), std::string("norm of ") + name_of(dtype), [&](Call& call) {
        set_row(call.rows[0], rule_cases(Rules{})[0], 1);
        call.rows[0].clip_norm = 0.01;
        call.call.measure_norm = true;
      });
}

/// float64 gradients whose squares leave the range, alone and beside others.
void check_second_look() {
  for (const double magnitude : {1e-320, 1e-200, 1e-160, 1e-140, 1e150, 1e160, 1e300, 0.0})
    for (const bool joint : {true, false}) {
      Buffers all = gradients(f64, {5, 20000, 1, 300}, 1.0);
      all[0].grad.fill(magnitude);
      all[1].grad.fill(magnitude);
      if (joint) all[2].grad.fill(magnitude), all[3].grad.fill(magnitude);
      compare(all, "second look", [&](Call& call) {
        set_row(call.rows[0], rule_cases(Rules{})[0], 1);
        call.rows[0].clip_norm = 1.0;
        call.call.measure_norm = true;
        call.call.joint = joint;
        if (joint) return;
        call.scales = {0.5, 0.5};
        call.rows.push_back(call.rows[0]);
        for (std::size_t t = 2; t < 4; ++t) call.tensors[t].scope = call.tensors[t].row = 1;
      });
    }
}

void check_scopes() {
  for (const bool joint : {true, false})
    for (const bool alike : {true, false})
      compare(gradients(f32, {100, 40000, 3, 16384, 7}),
              std::string("scopes ") + (joint ? "joint" : "own") + (alike ? " alike" : ""),
              [&](Call& call) {
                set_row(call.rows[0], rule_cases(Rules{})[0], 1);
                call.rows[0].clip_norm = 0.3;
                call.rows.assign(3, call.rows[0]);
                call.rows[1].rescale_grad = alike ? 0.5 : -2.0;
                call.rows[1].clip_norm = 0.7;
                call.rows[2].sign = -1.0;
                const bool one = joint && alike;  // of scopes that are alike the bindings make one
                call.scales.assign(one ? 1 : 3, 0.5);
                const std::uint32_t scopes[] = {0, 0, 1, 2, 2};
                for (std::size_t t = 0; t < 5; ++t) {
                  call.tensors[t].row = scopes[t];
                  call.tensors[t].scope = one ? 0 : scopes[t];
                }
                call.call.measure_norm = true;
                call.call.joint = joint;
              });
}

// --- what is skipped --------------------------------------------------------------------------

void check_nonfinite() {
  for (const double bad : {HUGE_VAL, double{NAN}})
    for (const Storage& storage : {storages[0], storages[1], storages[10], storages[14]})
      for (const bool skip : {true, false})
        for (const std::size_t where : {std::size_t{0}, std::size_t{1}, std::size_t{2}}) {
          Buffers all = make(storage, {5, 40000, 300}, 1);
          oracle::put(storage.grad, all[where].grad.data(), all[where].grad.numel() - 1, bad);
          compare(all, "nonfinite " + name(storage), [&](Call& call) {
            set_row(call.rows[0], rule_cases(Rules{})[1], 4);
            call.rows[0].clip_norm = 0.5;
            call.call.measure_norm = true;
            call.call.skip_nonfinite = skip;
          });
        }
  for (const double limit : {1e-3, 1e9})
    compare(make(storages[1], {50, 3000}, 1), "skip_norm", [&](Call& call) {
      set_row(call.rows[0], rule_cases(Rules{})[1], 4);
      call.call.measure_norm = true;
      call.call.skip_norm = limit;
    });
}

void check_given_norm() {
  for (const double given : {0.25, 40.0, HUGE_VAL, double{NAN}})
    for (const bool skip : {true, false})
      compare(make(storages[1], {50, 3000}, 1), "given norm", [&](Call& call) {
        static double norm;
        norm = given;
        set_row(call.rows[0], rule_cases(Rules{})[1], 4);
        call.rows[0].clip_norm = 0.5;
        call.call.given_norms = &norm;
        call.call.skip_nonfinite = call.call.measure_norm = skip;
      });
}

// --- other forms ------------------------------------------------------------------------------

/// Gradients that have to be gathered, of every type.
void check_layouts() {
  const std::int64_t shape[] = {7, 5, 3}, elements = 7 * 5 * 3;
  const auto run = [&](auto zero, GradLayout::Source source, const Storage& storage) {
    using Source = decltype(zero);
    constexpr std::int64_t size = sizeof(Source);
    std::vector<Source> memory(1000);
    for (std::size_t i = 0; i < memory.size(); ++i) {
      if constexpr (size == 2) {
        oracle::put(source == GradLayout::Source::float16 ? f16_ : bf16_, memory.data(),
                    static_cast<std::int64_t>(i), std::sin(static_cast<double>(i)));
      } else {
        memory[i] = static_cast<Source>(std::sin(static_cast<double>(i)));
      }
    }
    const std::int64_t strides[] = {-4 * size, 60 * size, 0};
    const GradLayout layout{source, 3, shape, strides};
    emulator_register(memory.data(), 1000 * size, 0);
    for (const bool clips : {false, true})
      compare(make(storage, {elements, 20}, 1), "layout " + name(storage), [&](Call& call) {
        set_row(call.rows[0], rule_cases(Rules{})[1], 2);
        call.tensors[0].layout = &layout;
        call.tensors[0].grad = &memory[500];
        call.call.measure_norm = clips;
        if (clips) call.rows[0].clip_norm = 0.5;
      });
    emulator_unregister(memory.data());
  };
  using Source = GradLayout::Source;
  for (const Storage& storage : {storages[0], storages[1], storages[15], storages[18]}) {
    run(0.0, Source::float64, storage);
    run(0.0f, Source::float32, storage);
    run(std::uint16_t{0}, Source::float16, storage);
    run(std::uint16_t{0}, Source::bfloat16, storage);
  }
}

/// Rows of several rules, steps and types at once, many tensors: tables too large for arguments.
void check_many() {
  const auto rules = rule_cases(Rules{});
  std::vector<std::int64_t> sizes;
  for (int i = 0; i < (few ? 90 : 400); ++i) sizes.push_back(1 + i * 37 % 1900);
  for (const bool clips : {false, true})
    for (const std::size_t kinds : {std::size_t{1}, std::size_t{5}}) {
      Buffers all;
      for (std::size_t i = 0; i < sizes.size(); ++i) {
        const Storage& storage = storages[kinds == 1 ? 1 : i % 5 * 5];
        all.emplace_back(storage, sizes[i], max_slots, static_cast<int>(i % 7));
      }
      compare(positive(all), "many", [&](Call& call) {
        call.rows.assign(kinds == 1 ? 3 : 8, call.rows[0]);
        for (std::size_t r = 0; r < call.rows.size(); ++r)
          set_row(call.rows[r], rules[kinds == 1 ? 1 : r], static_cast<std::int64_t>(r) + 1);
        for (std::size_t t = 0; t < call.tensors.size(); ++t)
          call.tensors[t].row = static_cast<std::uint32_t>(t % call.rows.size());
        if (clips)
          for (Row& row : call.rows) row.clip_norm = 2.0;
        call.call.measure_norm = clips;
      });
    }
}

/// Addresses in a tensor of more elements than 32 bits can count, which nobody touches here.
void check_large() {
  constexpr std::int64_t numel = (std::int64_t{1} << 33) + 4 * chunk_size + 5;
  Tensor tensors[2] = {};
  const auto at = [](std::uintptr_t address) { return reinterpret_cast<char*>(address); };
  tensors[0].param = at(0x100000000000);
  tensors[0].grad = at(0x200000000000);
  tensors[0].slots[0] = {at(0x300000000000), nullptr, DType::float32};
  tensors[0].grad_dtype = DType::bfloat16;
  tensors[0].numel = tensors[1].numel = numel;
  Row row{};
  row.rule = 1;
  DeviceCall call{};
  call.step.tensors = tensors;
  call.step.num_tensors = 2;
  call.step.rows = &row;
  call.step.num_rows = call.step.num_scopes = 1;
  cuda::Packed packed;
  cuda::pack(call, packed);
  cuda::Table table = packed.table;
  for (int k = 0; k < cuda::Table::num_parts; ++k)
    table.parts[k] = reinterpret_cast<const unsigned char*>(packed.parts[k].data());
  const std::int64_t chunks = (numel + chunk_size - 1) / chunk_size;
  check(packed.num_chunks() == 2 * chunks, "chunks of large tensors");
  for (const std::int64_t chunk : {std::int64_t{0}, std::int64_t{1}, chunks / 2, chunks - 2}) {
    const auto index = static_cast<std::uint32_t>(chunk);
    check(cuda::tensor_of(table, index) == 0, "tensor of a chunk");
    check(cuda::tensor_of(table, static_cast<std::uint32_t>(chunk + chunks)) == 1, "the other");
    const cuda::Buffers buffers = cuda::buffers_of<1>(table, 0, index);
    const std::int64_t begin = chunk * chunk_size;
    check(buffers.begin == begin && buffers.count == chunk_size, "elements of a chunk");
    check(buffers.param.data == at(0x100000000000) + begin * 4, "address of the parameter");
    check(buffers.grad.data == at(0x200000000000) + begin * 2, "address of the gradient");
    check(buffers.slots[0].data == at(0x300000000000) + begin * 4, "address of the state");
    check(cuda::grad_of(table, index).data == buffers.grad.data, "address for the norm");
  }
  const auto last = static_cast<std::uint32_t>(chunks - 1);
  check(cuda::buffers_of<1>(table, 0, last).count == 5, "the last chunk");
}

/// Every choice of a shift against all others.
void check_shifts() {
  using cuda::Address;
  const std::size_t sizes[] = {2, 4, 8};
  for (int trial = 0; trial < 2000; ++trial) {
    Address buffers[4];
    const int vector = trial % 2 ? 4 : 2;
    for (Address& buffer : buffers) {
      buffer.size = vector == 2 ? 8 : sizes[generator() % 2];
      buffer.data = 0x1000 + generator() % 16 * buffer.size;
    }
    const auto aligned = [&](int shift) {
      std::size_t bytes = 0;
      for (const Address& buffer : buffers)
        if (cuda::is_aligned(buffer, shift, vector)) bytes += buffer.size;
      return bytes;
    };
    const int shift = cuda::best_shift(buffers, 4, vector);
    bool best = shift >= 0 && shift < vector;
    for (int other = 0; other < vector; ++other)
      best = best && (aligned(other) < aligned(shift) ||
                      (aligned(other) == aligned(shift) && (shift <= other || !aligned(shift))));
    check(best, "best shift");
  }
}

/// Sums of the results of a rule that has states, which no kernel can make.
void check_refusal() {
  const Buffers all = make(storages[1], {50}, 1);
  Buffers on_device = all;
  Call call(tensors_of(on_device));
  set_row(call.rows[0], rule_cases(Rules{})[1], 4);
  const std::uint32_t scope_row = 0;
  DeviceCall device{};
  device.step = call.call;
  device.step.tensors = call.tensors.data();
  device.step.num_tensors = 1;
  device.step.rows = call.rows.data();
  device.step.num_rows = device.step.num_scopes = 1;
  device.step.scope_scale = call.scales.data();
  device.step.sums = StepCall::Sums::of_results;
  device.scope_rows = &scope_row;
  const DeviceApi& api = cuda::device_api();
  void *workspace = nullptr, *report = nullptr;
  check(!api.make_workspace(0, &workspace), "make_workspace");
  const char* const why = api.step(workspace, &device, &report);
  check(why && std::strstr(why, "a rule that has states"), "sums of results are not refused");
  api.free_workspace(workspace);
  check(!report && difference(on_device, all).empty(), "a refused step did something");
}

void check_all() {
  check_refusal();
  check_large();
  check_shifts();
  check_rules();
  check_alignment();
  check_norms();
  check_second_look();
  check_scopes();
  check_nonfinite();
  check_given_norm();
  check_layouts();
  check_many();
}

}  // namespace

int main(int argc, char** argv) {
  races = argc > 1 && std::string(argv[1]) == "races";
  few = races || (argc > 1 && std::string(argv[1]) == "few");
  emulator_reset();
  for (const std::int64_t order : {2, 1, 0}) {  // of threads and blocks: random, backward, forward
    emulator_set("order", order);
    check_all();
    if (few) break;
  }
  check(emulator_fault() == nullptr, emulator_fault() ? emulator_fault() : "");
  check(emulator_count("broken_guards") == 0, "guards of device memory");
  return report();
}
