#pragma once
#include <cstring>

#include "core/types.hpp"

/// What one optimizer step is, as plain data: the seam between the bindings (which validate and
/// fill it) and the backends (which execute it and cannot fail).
namespace fusedstep {

/// One state buffer of one tensor.
struct Slot {
  void* data = nullptr;
  void* aux = nullptr;  ///< block-wise stored states: float32 scales, one per `block_size` elements
  DType dtype = DType::float32;
};

/// A gradient that is not laid out or typed like the kernels read it. It is gathered chunk by chunk
/// into staging of the parameter's arithmetic type, rounded once.
struct GradLayout {
  enum class Source : std::uint8_t { float16, bfloat16, float32, float64, longdouble };
  Source source;
  int ndim;                     ///< sizes of 1 removed; adjacent dimensions joined where possible
  const std::int64_t* shape;    ///< outermost in the *parameter's* memory order first
  const std::int64_t* strides;  ///< bytes, may be negative or zero
};

/// One parameter with everything that belongs to it. `numel` > 0. Outputs do not overlap.
///
/// What the kernels read: a float64 parameter with float64 gradient and states; a float32 parameter
/// with float32 or 16-bit gradient and states and a 16-bit copy; a 16-bit parameter with gradient
/// and states of its own type or float32. A state of these may be int8_blocks. Everything else is
/// up to whoever fills this.
struct Tensor {
  void* param;
  const void* grad;
  void* copy;                ///< receives the new parameter rounded to `copy_dtype`, or null
  const GradLayout* layout;  ///< null: `grad` is dense, in the parameter's memory order
  Slot slots[max_slots];
  double* chunk_sums;  ///< one per chunk, or null; what for, says StepCall::sums
  std::int64_t numel;
  std::uint32_t row;    ///< index into StepCall::rows
  std::uint32_t scope;  ///< norm scope; non-decreasing over the tensors of a call
  DType param_dtype;
  DType grad_dtype;  ///< meaningless if `layout` is set
  DType copy_dtype;
};

/// Hyper-parameters shared by a run of tensors (a group, at one step count).
struct Row {
  int rule;                 ///< index into Rules
  bool coefficients_given;  ///< `hyper` holds the rule's coefficients; `prepare` is not called
  Progress progress;
  double rescale_grad;       ///< multiplies every gradient first
  double sign;               ///< +1, or -1 to maximize
  double clip_norm;          ///< +inf: no clipping
  double clip_value;         ///< +inf: no clipping
  double hyper[max_hypers];  ///< in the order of Rule::hypers
};

/// The hyper-parameters of a row by name.
template <class Rule>
FUSEDSTEP_HD typename Rule::Hyper hyper_of(const Row& row) {
  typename Rule::Hyper hyper;
  static_assert(sizeof hyper == sizeof(double) * length_of<decltype(Rule::hypers)>);
  static_assert(length_of<decltype(Rule::hypers)> <= max_hypers);
  std::memcpy(&hyper, row.hyper, sizeof hyper);
  return hyper;
}

/// Whose threads run a parallel region, if not this library's own.
struct Executor {
  void* context;
  /// Runs `body(body_context, worker)` as cpu::run_region does: on up to `threads` threads at once,
  /// the caller being worker 0, and returns when all that started have returned. Fewer may start.
  void (*run)(void* context, int threads, void (*body)(void* body_context, int worker),
              void* body_context);
};

struct StepCall {
  /// What Tensor::chunk_sums, sums of squares over the chunks of a tensor, are for.
  enum class Sums : std::uint8_t {
    none,
    of_gradients,  ///< known already: gradients need not be read before the update
    of_results,    ///< wanted: of the new parameters, while they are in cache
  };
  const Tensor* tensors;
  std::int64_t num_tensors;
  const Row* rows;
  int num_rows;
  /// Norm scopes, one or more. Each scope's gradients get a norm of their own, unless `joint`:
  /// then all scopes share sqrt(sum_k (scope_scale[k] * norm_k)^2), and a single tree runs over all
  /// tensors when every scope_scale is the same. `scope_scale` is |rescale_grad| of the scope. The
  /// tensors of one row are in one scope, unless `joint`.
  int num_scopes;
  const double* scope_scale;
  bool joint;
  bool measure_norm;    ///< read all gradients first and fill `norms`
  bool skip_nonfinite;  ///< write nothing if a norm is not finite (or the given one is not)
  double skip_norm =
      HUGE_VAL;  ///< write nothing if the norm of all is known and is not at most this
  Sums sums = Sums::none;
  /// Null, or norms that the caller has reduced already, before scope_scale: one per scope, a
  /// single one if `joint`. With `measure_norm` too, the gradients are only judged as finite or
  /// not.
  const double* given_norms;
  int num_threads;                     ///< upper bound; small calls stay on the calling thread
  const Executor* executor = nullptr;  ///< null: the threads of this library
};

/// What a step reports. The caller owns the arrays.
struct StepOutcome {
  double* norms;         ///< [num_scopes] scaled norms (all equal if joint); untouched if unknown
  double* tensor_norms;  ///< [num_tensors] scaled norms, or null; untouched if not measured
  double* clip_coefs;    ///< [num_rows] min(1, clip_norm / norm), without rescale_grad and sign
  double norm;           ///< of all scopes together; untouched if unknown
  bool nonfinite;        ///< a norm, measured or given, is not finite
  bool skipped;
  std::int64_t first_nonfinite;  ///< tensor index, -1 if none or not measured
};

}  // namespace fusedstep
