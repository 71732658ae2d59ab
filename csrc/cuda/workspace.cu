#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

#include "cuda/api.hpp"
#include "cuda/kernels.hpp"
#include "cuda/workspace.hpp"

namespace fusedstep::cuda {
namespace {

std::atomic<bool> backward{false};

unsigned num_blocks(std::uint32_t chunks) { return std::max<unsigned>(chunks, 1); }

}  // namespace

bool set_backward(bool now) { return backward.exchange(now); }

// --- tables in device memory ------------------------------------------------------------------

void SentPart::send_range(const std::vector<std::uint64_t>& words, std::size_t first,
                          std::size_t last, cudaStream_t stream) {
  constexpr std::size_t most = sizeof(Upload::words) / sizeof(std::uint64_t);
  Upload upload;
  for (; first < last; first += upload.count) {
    upload.to = buffer_.as<std::uint64_t>() + first;
    upload.count = static_cast<std::uint32_t>(std::min(most, last - first));
    std::memcpy(upload.words, words.data() + first, upload.count * sizeof(std::uint64_t));
    launch(upload_kernel(), upload, 1, threads, stream, "the launch of an upload");
  }
}

/// Of what has changed, from the first to the last of it: that is seldom much more than that.
const unsigned char* SentPart::send(const std::vector<std::uint64_t>& words, bool keep_old,
                                    cudaStream_t stream) {
  if (buffer_.reserve(words.size() * sizeof(std::uint64_t), keep_old)) sent_.clear();
  const std::size_t common = std::min(words.size(), sent_.size());
  std::size_t first = 0, last = words.size();
  while (first < common && words[first] == sent_[first]) ++first;
  if (last <= sent_.size())
    while (last > first && words[last - 1] == sent_[last - 1]) --last;
  sent_.resize(first);  // if sending fails, what is there is unknown
  send_range(words, first, last, stream);
  sent_ = words;
  return buffer_.as<unsigned char>();
}

// --- a step -----------------------------------------------------------------------------------

Workspace::~Workspace() {
  try {
    const DeviceGuard guard(device_);
    for (Buffer* buffer : {&constants_, &trees_, &norms_, &scratch_}) *buffer = Buffer();
    for (SentPart* part : {&rows_, &grads_, &slow_}) *part = SentPart();
    captured_.clear();
    control_ = Memory();
  } catch (const Error&) {  // the process ends, or the device is lost
  }
}

std::unique_ptr<Report> Workspace::step(const DeviceCall& call) {
  const DeviceGuard guard(device_);
  auto* const stream = static_cast<cudaStream_t>(call.stream);
  const bool capturing = is_capturing(stream);
  std::optional<RelaxedCapture> relaxed;
  if (capturing) relaxed.emplace();
  pack(call, packed_);
  was_captured_ = was_captured_ || capturing;
  std::unique_ptr<Report> report = make_report(call, capturing);
  describe(call, *report);
  place_scratch();
  place_tables(stream, capturing);
  launch_kernels(call, stream);
  return report;
}

std::unique_ptr<Report> Workspace::make_report(const DeviceCall& call, bool capturing) {
  const Table& table = packed_.table;
  auto memory = pool_->take(table.num_scopes, table.num_tensors, packed_.num_chunks());
  auto report = std::make_unique<Report>(pool_, std::move(memory), packed_.wide);
  if (capturing) report->keep_for_good();
  std::vector<std::uint32_t> scopes;
  scopes.reserve(table.num_tensors);
  for (std::int64_t t = 0; t < call.step.num_tensors; ++t)
    scopes.push_back(call.step.tensors[t].scope);
  report->set_tensors(packed_.chunks, std::move(scopes));
  return report;
}

/// The numbers of a step, but for addresses of tables and scratch.
void Workspace::describe(const DeviceCall& call, const Report& report) {
  const StepCall& from = call.step;
  Step step{};
  step.table = packed_.table;
  step.num_chunks = packed_.num_chunks();
  step.sums = from.sums;
  step.measures = from.measure_norm || call.only_sum;
  step.given = from.given_norms || call.given_norm.data;
  step.joint = from.joint;
  step.single_tree = from.num_scopes == 1;
  step.wide = packed_.wide;
  step.only_sum = call.only_sum;
  step.skip_nonfinite = from.skip_nonfinite;
  step.backward = backward;
  step.skip_norm = from.skip_norm;
  step.found_inf = call.found_inf;
  step.grad_scale = call.grad_scale;
  step.given_norm = call.given_norm;
  step.counts = call.counts;
  step.settled = step.measures || step.given || step.num_chunks == 0;
  step.report = report.memory().header();
  step.scope_scales = report.memory().scope_scales();
  step.tensor_norms = report.memory().tensor_norms();
  step.chunk_sums = report.memory().chunk_sums();
  arguments_.step = step;
}

void Workspace::place_scratch() {
  Step& step = arguments_.step;
  if (control_.size() == 0) {
    Memory control(sizeof(Control));
    control.clear();
    control_ = std::move(control);
  }
  const std::uint32_t chunks = step.num_chunks;
  const std::size_t scopes = step.table.num_scopes;
  // A second look of one tensor must not overwrite the sums of its tree.
  const std::size_t scratch = scratch_of(chunks) + (step.wide ? std::size_t{chunks} : 0);
  constants_.reserve(step.table.num_rows * sizeof(RowConstants), was_captured_);
  trees_.reserve(scopes * sizeof(Tree), was_captured_);
  norms_.reserve(scopes * sizeof(double), was_captured_);
  scratch_.reserve(scratch * sizeof(double), was_captured_);
  step.control = control_.as<Control>();
  step.constants = constants_.as<RowConstants>();
  step.trees = trees_.as<Tree>();
  step.norms = norms_.as<double>();
  step.scratch = scratch_.as<double>();
}

/// Puts what fits behind the arguments, first of all what changes often.
void Workspace::place_tables(cudaStream_t stream, bool capturing) {
  Step& step = arguments_.step;
  std::size_t used = 0;
  const auto place = [&](const std::vector<std::uint64_t>& words, SentPart& sent) {
    const std::size_t bytes = words.size() * sizeof(std::uint64_t);
    if (used + bytes <= sizeof arguments_.tables) {
      std::memcpy(arguments_.tables + used, words.data(), bytes);
      used += bytes;
      return static_cast<const unsigned char*>(nullptr);
    }
    return capturing ? captured_part(words) : sent.send(words, was_captured_, stream);
  };
  step.table.rows = place(packed_.rows, rows_);
  step.grads_inline = static_cast<std::uint32_t>(used);
  step.table.grads = place(packed_.grads, grads_);
  step.slow_inline = static_cast<std::uint32_t>(used);
  step.table.slow = place(packed_.slow, slow_);
}

/// A graph gets a table of its own, once, so that it consists of the step alone and later steps do
/// not disturb it. By another stream, as this one is being captured.
const unsigned char* Workspace::captured_part(const std::vector<std::uint64_t>& words) {
  const std::size_t bytes = words.size() * sizeof(std::uint64_t);
  Memory memory(bytes);
  const OwnStream stream;
  check(
      cudaMemcpyAsync(memory.as<void>(), words.data(), bytes, cudaMemcpyHostToDevice, stream.get()),
      "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  captured_.push_back(std::move(memory));
  return captured_.back().as<unsigned char>();
}

void Workspace::launch_kernels(const DeviceCall& call, cudaStream_t stream) {
  const Step& step = arguments_.step;
  if (step.settled) {
    const unsigned blocks = num_blocks(step.measures ? step.num_chunks : 0);
    launch(measure_kernel(), arguments_, blocks, threads, stream, "the launch of the first kernel");
  }
  if (call.only_sum || step.num_chunks == 0) return;
  launch(update_kernel(packed_.rule, packed_.access), arguments_, step.num_chunks, threads, stream,
         "the launch of the update kernel");
}

}  // namespace fusedstep::cuda
