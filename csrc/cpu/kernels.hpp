#pragma once
#include "core/gradient.hpp"
#include "core/step.hpp"
#include "rules/rules.hpp"

/// The seam between the step engine and the kernel objects (kernels.cpp, once per instruction set).
namespace fusedstep::cpu {

/// The address of element `i` of a buffer; null stays null.
FUSEDSTEP_HD void* element(const void* data, DType dtype, std::int64_t i) {
  char* const begin = static_cast<char*>(const_cast<void*>(data));
  return begin ? begin + i * static_cast<std::int64_t>(size_of(dtype)) : begin;
}

/// The slot from element `i` on; in a block-wise stored state `i` is a multiple of block_size.
FUSEDSTEP_HD Slot element(const Slot& slot, std::int64_t i) {
  return {element(slot.data, slot.dtype, i), element(slot.aux, DType::float32, i / block_size),
          slot.dtype};
}

/// Up to a chunk of one tensor, ready to be updated.
struct Update {
  void* param;
  const void* grad;
  void* copy;  ///< or null
  Slot slots[max_slots];
  std::int64_t count;  ///< at most chunk_size
  DType param_dtype, grad_dtype, copy_dtype;
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
