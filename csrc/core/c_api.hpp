#pragma once
#include "core/step.hpp"

/// The compiled core as the other modules of the package see it: one table of C functions over the
/// types of core/step.hpp, which `_core` exports as a capsule. Who reads it is compiled apart and
/// may be of another build, so it checks with `mismatch` before it calls anything.
namespace fusedstep {

struct CApi {
  static constexpr const char* module = "fusedstep._core";
  static constexpr const char* attribute = "_C_API";
  static constexpr const char* capsule = "fusedstep._core._C_API";  ///< its name
  /// Grows with every change of what the functions mean; sizes tell changes of the types.
  static constexpr std::uint32_t current_version = 1;

  std::uint32_t version = current_version;
  std::uint32_t table_size = sizeof(CApi);
  std::uint32_t tensor_size = sizeof(Tensor);
  std::uint32_t row_size = sizeof(Row);
  std::uint32_t call_size = sizeof(StepCall);
  std::uint32_t outcome_size = sizeof(StepOutcome);

  /// One step on the CPU. Returns null, or why nothing was done: a text that stays valid until the
  /// next call in this thread.
  const char* (*step)(const StepCall* call, StepOutcome* outcome);
  /// The norm of several parts together, from theirs.
  double (*join_norms)(const double* norms, std::int64_t count);
  /// State buffers of a rule; -1 if there is no such rule.
  int (*num_slots)(std::int64_t rule);
  /// The running product of a row's rule after the step that the row describes.
  double (*product_after)(const Row* row);
  /// Threads a step may use; 0 and a text in `error` if a variable of the environment is wrong.
  int (*num_threads)(const char** error);

  /// Null, or what of a table differs from what this code was compiled for.
  const char* mismatch() const {
    if (version != current_version) return "another version of the function table";
    const CApi mine{};
    const bool same = table_size == mine.table_size && tensor_size == mine.tensor_size &&
                      row_size == mine.row_size && call_size == mine.call_size &&
                      outcome_size == mine.outcome_size;
    return same ? nullptr : "types of other sizes in the function table";
  }
};

}  // namespace fusedstep
