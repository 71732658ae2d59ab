#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "cuda/api.hpp"
#include "cuda/kernels.hpp"
#include "cuda/workspace.hpp"

namespace fusedstep::cuda {
namespace {

std::atomic<bool> backward{false};

unsigned num_blocks(std::uint32_t chunks) { return std::max<unsigned>(chunks, 1); }

/// Whether chunk sums are all that is asked for. Without tensors it is their sum.
bool have_sums(const StepCall& call) {
  return call.num_tensors > 0 &&
         std::all_of(call.tensors, call.tensors + call.num_tensors,
                     [](const Tensor& tensor) { return tensor.chunk_sums != nullptr; });
}

/// Into memory of a graph, at once: then the graph consists of the step alone, and later steps do
/// not disturb it. By another stream, as this one is being captured.
const unsigned char* put_for_graph(const std::vector<std::uint64_t>& words, OfGraph& graph) {
  const std::size_t bytes = words.size() * sizeof(std::uint64_t);
  Memory memory(bytes);
  const OwnStream stream;
  check(
      cudaMemcpyAsync(memory.as<void>(), words.data(), bytes, cudaMemcpyHostToDevice, stream.get()),
      "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  graph.tables.push_back(std::move(memory));
  return graph.tables.back().as<unsigned char>();
}

/// The kernels of rules with states cannot sum their results, for which nobody asks.
void check_sums(const StepCall& step) {
  if (step.sums != StepCall::Sums::of_results) return;
  const auto has_states = [](const Tensor& tensor) { return tensor.slots[0].data != nullptr; };
  if (std::any_of(step.tensors, step.tensors + step.num_tensors, has_states))
    throw std::invalid_argument("sums of the results of a rule that has states");
}

}  // namespace

bool set_backward(bool now) { return backward.exchange(now); }

// --- memory of the device ---------------------------------------------------------------------

/// Only what has changed.
const unsigned char* SentPart::send(const std::vector<std::uint64_t>& words, cudaStream_t stream) {
  const bool grew = buffer_.reserve(words.size() * sizeof(std::uint64_t));
  const std::size_t known = std::exchange(complete_, false) && !grew ? sent_.size() : 0;
  sent_.resize(words.size());
  Upload upload;
  upload.to = buffer_.as<std::uint64_t>();
  upload.count = 0;
  const auto flush = [&] {
    if (upload.count > 0)
      launch(upload_kernel(), upload, 1, threads, stream, "the launch of an upload");
    upload.count = 0;
  };
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (i < known && sent_[i] == words[i]) continue;
    upload.places[upload.count] = static_cast<std::uint32_t>(i);
    upload.words[upload.count++] = sent_[i] = words[i];
    if (upload.count == Upload::most) flush();
  }
  flush();
  complete_ = true;
  return buffer_.as<unsigned char>();
}

void Scratch::place(Step& step) {
  if (control_.size() == 0) {
    Memory control(sizeof(Control));
    control.clear();
    control_ = std::move(control);
  }
  const std::uint32_t chunks = step.num_chunks;
  const std::size_t scopes = step.table.num_scopes;
  // A second look of one tensor must not overwrite the sums of its tree.
  const std::size_t values = scratch_of(chunks) + (step.wide ? std::size_t{chunks} : 0);
  constants_.reserve(step.table.num_rows * sizeof(RowConstants));
  trees_.reserve(scopes * sizeof(Tree));
  norms_.reserve(scopes * sizeof(double));
  values_.reserve(values * sizeof(double));
  step.control = control_.as<Control>();
  step.constants = constants_.as<RowConstants>();
  step.trees = trees_.as<Tree>();
  step.norms = norms_.as<double>();
  step.scratch = values_.as<double>();
}

// --- a step -----------------------------------------------------------------------------------

Workspace::~Workspace() {
  try {
    const DeviceGuard guard(device_);
    graphs_.clear();
    scratch_ = Scratch();
    for (SentPart& part : parts_) part = SentPart();
  } catch (const Error&) {  // the process ends, or the device is lost
  }
}

std::unique_ptr<Report> Workspace::step(const DeviceCall& call) {
  check_sums(call.step);
  const DeviceGuard guard(device_);
  const RelaxedCapture relaxed;  // memory may have to be allocated, whoever captures
  auto* const stream = static_cast<cudaStream_t>(call.stream);
  auto graph = is_capturing(stream) ? std::make_unique<OfGraph>() : nullptr;
  pack(call, packed_);
  std::unique_ptr<Report> report = make_report(call, graph != nullptr);
  describe(call, *report);
  (graph ? graph->scratch : scratch_).place(arguments_.step);
  place_tables(graph.get(), stream);
  launch_kernels(call, stream);
  if (graph) graphs_.push_back(std::move(graph));
  return report;
}

std::unique_ptr<Report> Workspace::make_report(const DeviceCall& call, bool capturing) {
  const Table& table = packed_.table;
  const std::size_t num_scopes = table.num_scopes, tensors = table.num_tensors;
  const std::size_t chunks = packed_.num_chunks();
  std::unique_ptr<ReportMemory> memory;
  if (capturing) {  // until the first replay it says so, with zeros
    memory = std::make_unique<ReportMemory>(num_scopes, tensors, chunks);
    memory->clear();
  } else {
    memory = pool_->take(num_scopes, tensors, chunks, static_cast<cudaStream_t>(call.stream));
  }
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
  step.large_trees = packed_.large_trees;
  step.only_sum = call.only_sum;
  step.only_chunks = call.only_sum && have_sums(from);
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

/// Puts what fits behind the arguments, first of all what changes often.
void Workspace::place_tables(OfGraph* graph, cudaStream_t stream) {
  Step& step = arguments_.step;
  std::size_t used = 0;
  for (int k = 0; k < Table::num_parts; ++k) {
    const std::vector<std::uint64_t>& words = packed_.parts[k];
    const std::size_t bytes = words.size() * sizeof(std::uint64_t);
    if (used + bytes <= sizeof arguments_.tables) {
      if (bytes > 0) std::memcpy(arguments_.tables + used, words.data(), bytes);
      step.places[k] = static_cast<std::uint32_t>(used);
      used += bytes;
    } else {
      step.table.parts[k] = graph ? put_for_graph(words, *graph) : parts_[k].send(words, stream);
    }
  }
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
