#pragma once
#include <vector>

#include "xla/common.hpp"

namespace fusedstep::xla {

/// Fills the gradients of tensors; owns the layouts of those that the kernels cannot read as they
/// are. (XLA's buffers are dense and row-major.)
class Gradients {
 public:
  explicit Gradients(std::size_t count) { layouts_.reserve(count), extents_.reserve(2 * count); }

  /// Needs `numel` and `param_dtype` of the tensor.
  void fill(Tensor& tensor, const ffi::AnyBuffer& grad) {
    const DType dtype = dtype_of(grad);
    tensor.grad = grad.untyped_data();
    tensor.grad_dtype = dtype;
    tensor.layout = reads_directly(dtype, tensor.param_dtype) ? nullptr : layout_of(tensor, dtype);
  }

 private:
  static bool reads_directly(DType grad, DType param) {
    if (param == DType::float64 || grad == DType::float64) return grad == param;
    return grad == DType::float32 || param == DType::float32 || grad == param;
  }

  static GradLayout::Source source_of(DType dtype) {
    switch (dtype) {
      case DType::float64: return GradLayout::Source::float64;
      case DType::float16: return GradLayout::Source::float16;
      case DType::bfloat16: return GradLayout::Source::bfloat16;
      default: return GradLayout::Source::float32;
    }
  }

  const GradLayout* layout_of(const Tensor& tensor, DType dtype) {
    extents_.push_back(tensor.numel);
    extents_.push_back(static_cast<std::int64_t>(size_of(dtype)));
    const std::int64_t* extents = &extents_[extents_.size() - 2];
    layouts_.push_back({source_of(dtype), 1, extents, extents + 1});
    return &layouts_.back();
  }

  std::vector<GradLayout> layouts_;
  std::vector<std::int64_t> extents_;
};

}  // namespace fusedstep::xla
