#pragma once
#include "core/gradient.hpp"
#include "core/step.hpp"
#include "rules/rules.hpp"

/// The seam between the step engine and the kernel objects (kernels.cpp, once per instruction set).
namespace fusedstep::cpu {

FUSEDSTEP_HD void* skip_bytes(void* data, std::int64_t bytes) {
  return data ? static_cast<char*>(data) + bytes : nullptr;
}

/// The buffer from element `i` on; in a block-wise stored state `i` is a multiple of block_size.
FUSEDSTEP_HD Slot slice(const Slot& from, std::int64_t i) {
  const auto stored_size = static_cast<std::int64_t>(size_of(from.dtype));
  constexpr auto scale_size = static_cast<std::int64_t>(sizeof(float));
  return {skip_bytes(from.data, i * stored_size), skip_bytes(from.aux, i / block_size * scale_size),
          from.dtype};
}

/// Up to a chunk of one tensor, ready to be updated.
struct Update {
  Slot param, grad, copy;  ///< the gradient is only read; the copy may be missing
  Slot slots[max_slots];
  std::int64_t count;  ///< at most chunk_size
  Conditioning<double> conditioning;
  const double* coefficients;  ///< of the rule
};

/// All of them run in the default floating-point environment only.
struct KernelTable {
  void (*update[Rules::size])(const Update& update);
  /// The chunk sum of the norm tree over `scale` * x. Needs a scale only in a second look: 1.0.
  double (*sum_squares)(const void* x, DType dtype, std::int64_t count, double scale);
  /// max|x|, NaN if any is NaN.
  double (*max_abs)(const void* x, DType dtype, std::int64_t count);
};

extern const KernelTable kernels_scalar;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;

/// The table of the active instruction set. Throws like `active_isa`.
const KernelTable& active_kernels();

}  // namespace fusedstep::cpu
