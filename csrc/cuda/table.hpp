#pragma once
#include <cstdint>

#include "core/device.hpp"
#include "core/gradient.hpp"
#include "core/norm_tree.hpp"

/// What a step on the GPU is, as the kernels read it: a few records of fixed form, which the host
/// packs (pack.hpp) and the device only reads. They travel as kernel arguments, or lie in memory of
/// the workspace.
namespace fusedstep::cuda {

constexpr int threads = 128;  ///< of every block
constexpr int warp_size = 32;
constexpr int warps = threads / warp_size;

/// A row, with what of it only the device knows.
struct RowRecord {
  Row row;
  DeviceRow device;
  std::uint32_t scope;
  bool used;  ///< a tensor has it
};

/// One norm's tensors: from its first one to the next scope's.
struct ScopeRecord {
  double given;          ///< a norm before rescale_grad, if the caller has given it
  std::uint32_t tensor;  ///< the first
  std::uint32_t row;     ///< one with its rescale_grad
  bool wide;             ///< has float64 gradients, so that squares may leave the range
};

/// What an update kernel takes.
enum class Access : std::uint8_t {
  float32,  ///< tensors whose buffers are all float32
  float64,  ///< all float64
  mixed,    ///< float32 arithmetic, dense gradients, buffers stored element by element
  any,      ///< everything, of any rules
};

struct TensorRecord {
  void* param;
  void* copy;
  void* slots[max_slots];
  std::int64_t numel;
  std::uint32_t row, scope;
  DType param_dtype, grad_dtype, copy_dtype, slot_dtypes[max_slots];
  bool blocks;         ///< a state is stored as int8_blocks
  std::uint8_t shift;  ///< elements that the first vector of a chunk begins before it
};
static_assert(sizeof(TensorRecord) == 64);

/// Of a gradient that has to be gathered; see GradLayout. Shape and strides follow.
struct LayoutRecord {
  std::int64_t source, ndim;
};

/// What few tensors have.
struct ExtraRecord {
  void* aux[max_slots];
  double* chunk_sums;
  std::int64_t layout;  ///< where the LayoutRecord is, in words; -1: the gradient is dense
};

/// The records of a step, in three parts, by how often they change.
///
///   rows: rows, scopes
///   grads: addresses of the gradients
///   tensors: first chunk of each tensor (and their number), tensors, extras, layouts
struct Table {
  static constexpr int num_parts = 3;
  const unsigned char* parts[num_parts];
  std::uint32_t num_rows, num_scopes, num_tensors;
  bool has_extras;

  FUSEDSTEP_HD const RowRecord& row(std::uint32_t r) const { return at<RowRecord>(0, 0)[r]; }
  FUSEDSTEP_HD const ScopeRecord& scope(std::uint32_t k) const {
    return at<ScopeRecord>(0, scopes_begin())[k];
  }
  FUSEDSTEP_HD const void* grad(std::uint32_t t) const { return at<const void*>(1, 0)[t]; }
  FUSEDSTEP_HD const std::uint32_t* first_chunks() const { return at<std::uint32_t>(2, 0); }
  FUSEDSTEP_HD const TensorRecord& tensor(std::uint32_t t) const {
    return at<TensorRecord>(2, tensors_begin())[t];
  }
  FUSEDSTEP_HD const ExtraRecord& extra(std::uint32_t t) const {
    return at<ExtraRecord>(2, extras_begin())[t];
  }
  FUSEDSTEP_HD const LayoutRecord* layout(std::uint32_t t) const {
    const std::int64_t begin = has_extras ? extra(t).layout : -1;
    if (begin < 0) return nullptr;
    return at<LayoutRecord>(2, static_cast<std::size_t>(begin) * sizeof(std::int64_t));
  }
  FUSEDSTEP_HD double* chunk_sums(std::uint32_t t) const {
    return has_extras ? extra(t).chunk_sums : nullptr;
  }

  FUSEDSTEP_HD std::size_t scopes_begin() const { return num_rows * sizeof(RowRecord); }
  FUSEDSTEP_HD std::size_t rows_size() const {
    return scopes_begin() + num_scopes * sizeof(ScopeRecord);
  }
  FUSEDSTEP_HD std::size_t grads_size() const { return num_tensors * sizeof(void*); }
  FUSEDSTEP_HD std::size_t tensors_begin() const {
    return (num_tensors + 2) / 2 * 2 * sizeof(std::uint32_t);  // of 8 bytes
  }
  FUSEDSTEP_HD std::size_t extras_begin() const {
    return tensors_begin() + num_tensors * sizeof(TensorRecord);
  }
  /// Layouts come after that.
  FUSEDSTEP_HD std::size_t layouts_begin() const {
    return extras_begin() + (has_extras ? num_tensors * sizeof(ExtraRecord) : 0);
  }

 private:
  template <class T>
  FUSEDSTEP_HD const T* at(int part, std::size_t begin) const {
    return reinterpret_cast<const T*>(parts[part] + begin);
  }
};

/// The tensor that a chunk belongs to.
FUSEDSTEP_HD std::uint32_t tensor_of(const Table& table, std::uint32_t chunk) {
  const std::uint32_t* const first = table.first_chunks();
  std::uint32_t low = 0, high = table.num_tensors;  // first[low] <= chunk < first[high]
  while (high - low > 1) {
    const std::uint32_t middle = low + (high - low) / 2;
    (first[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

/// What `prepare` makes of a row.
struct RowConstants {
  Conditioning<double> conditioning;
  double coefficients[max_coefficients];
  double clip_coefficient;
  std::int64_t step;  ///< the progress of the row: of the step to be taken,
  bool first;
  bool fresh_after;                ///< Cell::fresh, should the step be applied
  double product_before, product;  ///< and the product after it
};

/// One norm, in the making.
struct Tree {
  double sum, norm;
  double scale;  ///< of the gradients, a power of two; not 1 in a second look
};

/// Values that summing `count` of them writes, level by level (sum_by_block in squares.hpp).
FUSEDSTEP_HD std::uint32_t scratch_of(std::uint32_t count) {
  std::uint32_t size = 0;
  while (count > 1) size += count = (count + norm_tree::tile_size - 1) / norm_tree::tile_size;
  return size;
}

/// What blocks tell each other; counts are zero between launches.
struct Control {
  unsigned finished;   ///< blocks
  unsigned underflow;  ///< chunks of float64 that are not zero, but whose squares are
  int skipped;
};

/// The arguments of both kernels of a step, but for what of the table fits in behind it.
struct Step {
  Table table;                             ///< null parts lie behind this:
  std::uint32_t places[Table::num_parts];  ///< where they begin there
  std::uint32_t num_chunks;
  StepCall::Sums sums;
  bool settled;  ///< a first kernel has measured, and written `constants`
  bool measures, given, joint, single_tree, wide, skip_nonfinite, backward;
  bool only_sum;     ///< of squares, or
  bool only_chunks;  ///< not even that: sums of chunks. Several such steps may run at once
  bool large_trees;  ///< there may be scopes of more chunks than one warp sums
  double skip_norm;
  DeviceNumber found_inf, grad_scale;
  DeviceNumber given_norm;  ///< instead of those of the scopes
  Control* control;
  RowConstants* constants;
  Tree* trees;
  double* norms;    ///< of the scopes
  double* scratch;  ///< see settle.hpp
  DeviceReport* report;
  double* scope_scales;  ///< |rescale_grad| of each scope
  double* tensor_norms;
  double* chunk_sums;
  Counts* counts;
};

constexpr std::size_t max_arguments = 4096;  ///< of every CUDA since the first
struct Arguments {
  Step step;
  alignas(8) unsigned char tables[max_arguments - sizeof(Step)];
};
static_assert(sizeof(Arguments) == max_arguments);

}  // namespace fusedstep::cuda
