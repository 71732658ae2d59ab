#include "cpu/step.hpp"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "core/float_env.hpp"
#include "core/norm_tree.hpp"
#include "core/norms.hpp"
#include "cpu/kernels.hpp"
#include "cpu/placement.hpp"
#include "cpu/staging.hpp"
#include "cpu/threads.hpp"
#include "cpu/work.hpp"

namespace fusedstep::cpu {
namespace {

// --- rows -------------------------------------------------------------------------------------

/// What the kernels need of a row.
struct RowConstants {
  Conditioning<double> conditioning;
  double coefficients[max_coefficients];
};

template <class Rule>
void prepare_coefficients(const Row& row, double* coefficients) {
  static_assert(length_of<decltype(Rule::coefficients)> <= max_coefficients);
  Rule::prepare(hyper_of<Rule>(row), row.progress, coefficients);
}

template <class... All>
void prepare_coefficients(RuleList<All...> /*rules*/, const Row& row, double* coefficients) {
  static_assert(max_coefficients <= max_hypers);
  using Prepare = void (*)(const Row&, double*);
  static constexpr Prepare prepare[] = {prepare_coefficients<All>...};
  if (row.coefficients_given) {
    std::memcpy(coefficients, row.hyper, max_coefficients * sizeof(double));
  } else {
    prepare[row.rule](row, coefficients);
  }
}

// --- how many threads -------------------------------------------------------------------------

// Where two threads beat one (measured: 2 CPUs of Zen 4, 2026). Workers that sleep between regions,
// rather than spin for a while, take 50 us to wake.
constexpr std::int64_t parallel_elements = 131072, parallel_elements_asleep = 524288;
constexpr std::int64_t elements_per_thread = 65536;

bool workers_sleep() {
  static const bool passive = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return policy && (policy[0] == 'p' || policy[0] == 'P');
  }();
  return passive;
}

int useful_threads(std::int64_t elements, std::int64_t most, bool only_sum) {
  const std::int64_t least = workers_sleep() ? parallel_elements_asleep : parallel_elements;
  if (elements < (only_sum ? 2 * least : least)) return 1;
  most = std::min(most, elements / elements_per_thread);
  return static_cast<int>(std::max<std::int64_t>(most, 1));
}

// --- one step ---------------------------------------------------------------------------------

/// A stage runs over all chunks. The thread that finishes a stage's last chunk decides what comes
/// next, the others wait for that decision. The two stages in the middle are the second look.
enum class Stage { measure, find_max, measure_scaled, update, finished };
constexpr int num_stages = static_cast<int>(Stage::finished);

/// One norm: a tree over the chunks of neighbouring tensors.
struct Tree {
  std::uint32_t first = 0, last = 0;  ///< chunks
  bool wide = false;     ///< has float64 gradients, so that squares may leave the range
  bool settled = false;  ///< `norm` is known
  double scale = 1.0;    ///< of the gradients, a power of two; not 1 in a second look
  double sum = 0.0, norm = 0.0;
};

/// Memory that a thread keeps from call to call.
struct Workspace {
  std::vector<Chunk> chunks;
  std::vector<double> sums;    ///< one per chunk
  std::vector<double> maxima;  ///< one per chunk, if a second look may become necessary
  std::vector<Tree> trees;
  std::vector<RowConstants> rows;
  std::vector<std::uint32_t> row_scopes;
  std::vector<double> staging;  ///< a chunk per worker
  std::vector<Share> shares;    ///< [num_stages][threads]
};
thread_local Workspace thread_workspace;

class Job {
 public:
  Job(const StepCall& call, StepOutcome& outcome, bool only_sum)
      : call_(call), outcome_(outcome), only_sum_(only_sum), work_(thread_workspace) {}

  /// Returns the sum of squares of the first tree.
  double run();

 private:
  bool has_single_tree() const;
  void list_work();
  void reserve();
  void run_serially(Stage stage);
  void run_on_threads(Stage stage);
  void work(int worker);
  void start(Stage stage);
  void run_chunk(Stage stage, std::uint32_t index, int worker);
  Slot gradient(const Tensor& tensor, const Chunk& chunk, int worker);
  Stage first_stage();
  void update(const Tensor& tensor, const Chunk& chunk, int worker);
  Stage stage_after(Stage stage);
  void read_sums(Tree& tree);
  void read_max(Tree& tree);
  Stage settle();
  void report_chunk_sums() const;
  void report_norms();
  void report_tensor_norms();
  double look_again(std::uint32_t first, std::uint32_t last);
  void share_given_norms();
  double joint_norm() const;
  std::int64_t first_nonfinite();
  void prepare_rows(const double* norms);

  Tree& tree_of(const Tensor& tensor) { return work_.trees[single_tree_ ? 0 : tensor.scope]; }
  Share* shares(Stage stage) { return work_.shares.data() + static_cast<int>(stage) * threads_; }
  std::int64_t num_chunks() const { return static_cast<std::int64_t>(work_.chunks.size()); }

  const StepCall& call_;
  StepOutcome& outcome_;
  const bool only_sum_;
  Workspace& work_;
  const KernelTable& kernels_ = active_kernels();
  bool single_tree_ = true;
  bool stages_gradients_ = false;
  std::int64_t elements_ = 0;
  int threads_ = 1;
  std::atomic<Stage> stage_{Stage::finished};
  std::atomic<std::int64_t> finished_chunks_[num_stages] = {};
};

double Job::run() {
  const FloatEnvironment environment;
  list_work();
  const std::int64_t most = std::min<std::int64_t>(call_.num_threads, num_chunks());
  threads_ = useful_threads(elements_, most, only_sum_);
  reserve();
  const Stage first = first_stage();
  threads_ == 1 ? run_serially(first) : run_on_threads(first);
  if (only_sum_) report_chunk_sums();
  return work_.trees[0].sum;
}

void Job::report_chunk_sums() const {
  for (std::size_t i = 0; i < work_.chunks.size(); ++i) {
    const Chunk& chunk = work_.chunks[i];
    double* const sums = call_.tensors[chunk.tensor].chunk_sums;
    if (sums != nullptr) sums[chunk.begin / chunk_size] = work_.sums[i];
  }
}

Stage Job::first_stage() {
  if (!call_.measure_norm) return settle();
  if (call_.sums != StepCall::Sums::of_gradients) return Stage::measure;
  for (std::size_t i = 0; i < work_.chunks.size(); ++i) {
    const Chunk& chunk = work_.chunks[i];
    work_.sums[i] = call_.tensors[chunk.tensor].chunk_sums[chunk.begin / chunk_size];
  }
  return stage_after(Stage::measure);
}

/// Everything that is allocated is allocated before the first stage.
void Job::reserve() {
  work_.sums.resize(work_.chunks.size());
  const auto wide = [](const Tree& tree) { return tree.wide; };
  if (std::any_of(work_.trees.begin(), work_.trees.end(), wide))
    work_.maxima.resize(work_.chunks.size());
  const auto threads = static_cast<std::size_t>(threads_);
  if (stages_gradients_) work_.staging.resize(threads * chunk_size);
  const std::size_t num_shares = threads_ > 1 ? threads * num_stages : 0;
  if (work_.shares.size() < num_shares) work_.shares = std::vector<Share>(num_shares);
}

bool Job::has_single_tree() const {
  for (int k = 1; k < call_.num_scopes; ++k)
    if (!call_.joint || call_.scope_scale[k] != call_.scope_scale[0]) return false;
  return true;
}

void Job::list_work() {
  single_tree_ = has_single_tree();
  work_.chunks.clear();
  work_.trees.assign(single_tree_ ? 1 : static_cast<std::size_t>(call_.num_scopes), Tree{});
  work_.rows.resize(static_cast<std::size_t>(call_.num_rows));
  work_.row_scopes.assign(work_.rows.size(), 0);
  for (std::int64_t t = 0; t < call_.num_tensors; ++t) {
    const Tensor& tensor = call_.tensors[t];
    Tree& tree = tree_of(tensor);
    if (tree.first == tree.last) tree.first = static_cast<std::uint32_t>(work_.chunks.size());
    append_chunks(static_cast<std::uint32_t>(t), tensor.numel, work_.chunks);
    tree.last = static_cast<std::uint32_t>(work_.chunks.size());
    const DType grad = tensor.layout ? arithmetic_of(tensor.param_dtype) : tensor.grad_dtype;
    tree.wide |= grad == DType::float64;
    stages_gradients_ |= tensor.layout != nullptr;
    elements_ += tensor.numel;
    if (!only_sum_) work_.row_scopes[tensor.row] = tensor.scope;
  }
}

// --- running stages ---------------------------------------------------------------------------

void Job::run_serially(Stage stage) {
  for (; stage != Stage::finished; stage = stage_after(stage))
    for (std::uint32_t i = 0; i < work_.chunks.size(); ++i) run_chunk(stage, i, 0);
}

void Job::run_on_threads(Stage stage) {
  if (stage == Stage::finished) return;
  start(stage);
  const auto body = [](void* job, int worker) {
    if (worker == 0) return static_cast<Job*>(job)->work(0);  // the environment is set
    const FloatEnvironment environment;
    static_cast<Job*>(job)->work(worker);
  };
  const Executor* executor = call_.executor;
  executor ? executor->run(executor->context, threads_, body, this)
           : run_region(threads_, body, this);
}

void Job::start(Stage stage) {
  // Every stage has shares of its own: a thread that comes late may still look into an earlier one.
  if (stage != Stage::finished) deal(work_.chunks, elements_, shares(stage), threads_);
  stage_.store(stage, std::memory_order_release);
}

void Job::work(int worker) {
  // Larger batches save a little, where they still can be balanced.
  const std::uint32_t batch = num_chunks() > 64 * threads_ ? 4 : 1;
  for (Stage stage; (stage = stage_.load(std::memory_order_acquire)) != Stage::finished;) {
    const std::int64_t done =
        visit_shares(shares(stage), threads_, worker, batch,
                     [&](std::uint32_t index) { run_chunk(stage, index, worker); });
    if (stage == Stage::update) return;
    // Not a barrier: fewer threads than asked may be here, the last chunk is what counts.
    auto& finished = finished_chunks_[static_cast<int>(stage)];
    if (done > 0 && finished.fetch_add(done, std::memory_order_acq_rel) + done == num_chunks())
      start(stage_after(stage));
    for (int spin = 0; stage_.load(std::memory_order_relaxed) == stage; ++spin)
      spin < 200 ? relax_cpu() : static_cast<void>(sched_yield());
  }
}

void Job::run_chunk(Stage stage, std::uint32_t index, int worker) {
  const Chunk& chunk = work_.chunks[index];
  const Tensor& tensor = call_.tensors[chunk.tensor];
  if (stage == Stage::update) return update(tensor, chunk, worker);
  const Tree& tree = tree_of(tensor);
  if (tree.settled) return;
  const Slot grad = gradient(tensor, chunk, worker);
  if (stage == Stage::find_max) {
    work_.maxima[index] = kernels_.max_abs(grad.data, grad.dtype, chunk.count);
  } else {
    work_.sums[index] = kernels_.sum_squares(grad.data, grad.dtype, chunk.count, tree.scale);
  }
}

Slot Job::gradient(const Tensor& tensor, const Chunk& chunk, int worker) {
  if (!tensor.layout)
    return slice({const_cast<void*>(tensor.grad), nullptr, tensor.grad_dtype}, chunk.begin);
  double* const staging = &work_.staging[static_cast<std::size_t>(worker) * chunk_size];
  gather(tensor, chunk.begin, chunk.count, staging);
  return {staging, nullptr, arithmetic_of(tensor.param_dtype)};
}

void Job::update(const Tensor& tensor, const Chunk& chunk, int worker) {
  const RowConstants& row = work_.rows[tensor.row];
  Update u;
  u.param = slice({tensor.param, nullptr, tensor.param_dtype}, chunk.begin);
  u.grad = gradient(tensor, chunk, worker);
  u.copy = slice({tensor.copy, nullptr, tensor.copy_dtype}, chunk.begin);
  for (int s = 0; s < max_slots; ++s) u.slots[s] = slice(tensor.slots[s], chunk.begin);
  u.count = chunk.count;
  u.conditioning = row.conditioning;
  u.coefficients = row.coefficients;
  kernels_.update[call_.rows[tensor.row].rule](u);
  if (call_.sums == StepCall::Sums::of_results)
    tensor.chunk_sums[chunk.begin / chunk_size] =
        kernels_.sum_squares(u.param.data, u.param.dtype, chunk.count, 1.0);
}

// --- between stages: one thread, all chunks of the stage are done -----------------------------

Stage Job::stage_after(Stage stage) {
  if (stage == Stage::update) return Stage::finished;
  bool settled = true;
  for (Tree& tree : work_.trees) {
    if (!tree.settled) stage == Stage::find_max ? read_max(tree) : read_sums(tree);
    settled = settled && tree.settled;
  }
  if (!settled) return stage == Stage::measure ? Stage::find_max : Stage::measure_scaled;
  return only_sum_ ? Stage::finished : settle();
}

void Job::read_sums(Tree& tree) {
  const bool second_look = tree.scale != 1.0;
  tree.sum = norm_tree::sum_chunks(work_.sums.data() + tree.first, tree.last - tree.first);
  tree.norm = std::sqrt(tree.sum) / tree.scale;
  tree.settled = only_sum_ || second_look || !tree.wide || !norm_tree::needs_second_look(tree.sum);
}

void Job::read_max(Tree& tree) {
  double largest = 0;
  for (std::uint32_t i = tree.first; i < tree.last; ++i)
    largest = std::max(largest, work_.maxima[i]);
  tree.norm = largest;
  tree.settled = largest == 0 || std::isinf(largest);
  if (!tree.settled) tree.scale = std::ldexp(1.0, -norm_tree::second_look_exponent(largest));
}

/// Norms are known, or not wanted: whether to update, and by which constants.
Stage Job::settle() {
  outcome_.first_nonfinite = -1;
  bool finite = true;
  const bool known = call_.measure_norm || call_.given_norms;
  if (call_.measure_norm) {
    report_norms();
    if (outcome_.tensor_norms) report_tensor_norms();
    finite = std::isfinite(outcome_.norm);
    if (!finite) outcome_.first_nonfinite = first_nonfinite();
  }
  if (call_.given_norms) {
    share_given_norms();
    finite = finite && std::isfinite(outcome_.norm);
  }
  const bool refused = known && exceeds(outcome_.norm, call_.skip_norm);
  outcome_.nonfinite = !finite;
  outcome_.skipped = refused || (call_.skip_nonfinite && !finite);
  prepare_rows(known ? outcome_.norms : nullptr);
  return outcome_.skipped ? Stage::finished : Stage::update;
}

void Job::report_norms() {
  for (int k = 0; k < call_.num_scopes; ++k) {
    const double norm = work_.trees[single_tree_ ? 0 : static_cast<std::size_t>(k)].norm;
    outcome_.norms[k] = plain_nan(call_.scope_scale[k] * norm);
  }
  outcome_.norm = joint_norm();
  if (call_.joint) std::fill_n(outcome_.norms, call_.num_scopes, outcome_.norm);
}

/// Of each tensor, from its own chunk sums.
void Job::report_tensor_norms() {
  std::uint32_t first = 0;
  for (std::int64_t t = 0; t < call_.num_tensors; ++t) {
    const Tensor& tensor = call_.tensors[t];
    const auto chunks = static_cast<std::uint32_t>((tensor.numel + chunk_size - 1) / chunk_size);
    const Tree& tree = tree_of(tensor);
    const double sum = norm_tree::sum_chunks(work_.sums.data() + first, chunks);
    const bool safe = !tree.wide || !norm_tree::needs_second_look(sum);
    const double norm = safe ? std::sqrt(sum) / tree.scale : look_again(first, first + chunks);
    outcome_.tensor_norms[t] = plain_nan(call_.scope_scale[tensor.scope] * norm);
    first += chunks;
  }
}

/// The norm of the chunks of one tensor that is far smaller or larger than its tree. (Slow, but
/// float64 gradients beyond 1e+-135 are rare.)
double Job::look_again(std::uint32_t first, std::uint32_t last) {
  const auto grad_of = [&](std::uint32_t i) {
    return gradient(call_.tensors[work_.chunks[i].tensor], work_.chunks[i], 0);
  };
  double largest = 0;
  for (std::uint32_t i = first; i < last; ++i) {
    const Slot grad = grad_of(i);
    const double here = kernels_.max_abs(grad.data, grad.dtype, work_.chunks[i].count);
    largest = here > largest || std::isnan(here) ? here : largest;
  }
  if (largest == 0 || !std::isfinite(largest)) return largest;
  const double scale = std::ldexp(1.0, -norm_tree::second_look_exponent(largest));
  for (std::uint32_t i = first; i < last; ++i) {
    const Slot grad = grad_of(i);
    work_.maxima[i] = kernels_.sum_squares(grad.data, grad.dtype, work_.chunks[i].count, scale);
  }
  return std::sqrt(norm_tree::sum_chunks(work_.maxima.data() + first, last - first)) / scale;
}

void Job::share_given_norms() {
  for (int k = 0; k < call_.num_scopes; ++k)
    outcome_.norms[k] = plain_nan(call_.scope_scale[k] * call_.given_norms[call_.joint ? 0 : k]);
  outcome_.norm = call_.joint ? outcome_.norms[0] : joint_norm();
}

/// The norm of all scopes together.
double Job::joint_norm() const {
  return single_tree_ ? outcome_.norms[0] : joined_norm(outcome_.norms, call_.num_scopes);
}

std::int64_t Job::first_nonfinite() {
  for (std::size_t i = 0; i < work_.chunks.size(); ++i) {
    if (std::isfinite(work_.sums[i])) continue;
    // The squares of finite float64 elements may have overflowed.
    const Chunk& chunk = work_.chunks[i];
    const Slot grad = gradient(call_.tensors[chunk.tensor], chunk, 0);
    if (!std::isfinite(kernels_.max_abs(grad.data, grad.dtype, chunk.count))) return chunk.tensor;
  }
  return -1;
}

void Job::prepare_rows(const double* norms) {
  for (std::size_t r = 0; r < work_.rows.size(); ++r) {
    const Row& row = call_.rows[r];
    const double norm = norms ? norms[call_.joint ? 0 : work_.row_scopes[r]] : 0.0;
    outcome_.clip_coefs[r] = clip_coefficient(row.clip_norm, norm);
    work_.rows[r].conditioning = prepare_gradient(row, norm);
    prepare_coefficients(Rules{}, row, work_.rows[r].coefficients);
  }
}

}  // namespace

void step(const StepCall& call, StepOutcome& outcome) {
  outcome.skipped = false;
  Job(call, outcome, false).run();
}

double join_norms(const double* norms, std::int64_t count) {
  const FloatEnvironment environment;
  return count == 1 ? norms[0] : joined_norm(norms, count);
}

double sum_squares(const Tensor* tensors, std::int64_t num_tensors, int num_threads) {
  constexpr double scale = 1.0;
  StepCall call{};
  call.tensors = tensors;
  call.num_tensors = num_tensors;
  call.num_scopes = 1;
  call.scope_scale = &scale;
  call.joint = true;
  call.measure_norm = true;
  call.num_threads = num_threads;
  StepOutcome outcome{};
  return Job(call, outcome, true).run();
}

}  // namespace fusedstep::cpu
