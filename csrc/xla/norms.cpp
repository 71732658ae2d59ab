#include <vector>

#include "xla/executor.hpp"
#include "xla/gradients.hpp"
#include "xla/handlers.hpp"

namespace fusedstep::xla {

namespace {

/// What a step on these gradients takes, of which only the norms are wanted.
struct Measurement {
  Measurement(std::size_t num_gradients, std::size_t num_norms)
      : gradients(num_gradients), norms(num_norms, 0.0), scales(num_norms, 1.0) {}
  Gradients gradients;
  std::vector<Tensor> tensors;
  std::vector<double> norms, scales;
};

void add(Measurement& m, const ffi::AnyBuffer& grad, DType param_dtype, std::uint32_t scope) {
  Tensor tensor{};
  tensor.numel = static_cast<std::int64_t>(grad.element_count());
  if (tensor.numel == 0) return;
  tensor.param_dtype = param_dtype;
  tensor.scope = scope;
  m.gradients.fill(tensor, grad);
  m.tensors.push_back(tensor);
}

void measure(Measurement& m, const PoolExecutor& pool) {
  const Row row{};
  double unused = 0;
  StepCall call{};
  call.tensors = m.tensors.data();
  call.num_tensors = static_cast<std::int64_t>(m.tensors.size());
  call.rows = &row;
  call.num_rows = 1;
  call.num_scopes = static_cast<int>(m.norms.size());
  call.scope_scale = m.scales.data();
  call.joint = m.norms.size() == 1;
  call.measure_norm = true;
  call.skip_norm = -1;  // which no norm keeps: nothing is written
  pool.use_in(call);
  StepOutcome outcome{};
  outcome.norms = m.norms.data();
  outcome.clip_coefs = &unused;
  run(call, outcome);
}

/// Norms of gradients: of all together, or with `per_array` of each. `param_dtypes` (as DType) say
/// what they are rounded to where the kernels do not read them as they are.
ffi::Error norms(ffi::ThreadPool pool, ffi::RemainingArgs grads, ffi::Result<Words> out,
                 ffi::Span<const std::int64_t> param_dtypes, bool per_array) {
  return guarded("fusedstep.norms", [&] {
    require(param_dtypes.size() == grads.size(), "one param_dtype for each gradient");
    require(num_doubles(*out) == (per_array ? grads.size() : 1), "as many results as norms");
    Measurement m(grads.size(), num_doubles(*out));
    for (std::size_t i = 0; i < grads.size(); ++i)
      add(m, operand(grads, i), static_cast<DType>(param_dtypes[i]),
          per_array ? static_cast<std::uint32_t>(i) : 0);
    if (!m.norms.empty()) measure(m, PoolExecutor(pool));
    for (std::size_t k = 0; k < m.norms.size(); ++k) put_double(*out, k, m.norms[k]);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedstep_norms_cpu, norms,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<Words>()
                                  .Attr<ffi::Span<const std::int64_t>>("param_dtypes")
                                  .Attr<bool>("per_array"));

}  // namespace fusedstep::xla
