#pragma once
#include <cstdint>

#include "core/step.hpp"

/// The seam between the bindings and a backend whose memory is not the host's. Such a backend is a
/// module of its own (csrc/cuda), loaded when the first of its buffers is seen, and known by a
/// table of C functions.
///
/// A step is only put into a stream: the functions return before it has run, and nothing of it is
/// known to the host until a report is read.
namespace fusedstep {

/// A number in device memory that is read there, when the step runs. There is none if `data` is
/// null.
struct DeviceNumber {
  enum class Type : std::uint8_t { float16, bfloat16, float32, float64, int32, int64, boolean };
  void* data = nullptr;
  Type type = Type::float32;
};

/// How far some tensors have come, in device memory: only the device knows whether a step was
/// applied. The same as Progress after that step.
struct Cell {
  std::int64_t steps;  ///< applied
  double product;      ///< see Progress
  std::int64_t fresh;  ///< not 0: the state was made for a step that was then skipped
};

/// How an optimizer has fared, in device memory.
struct Counts {
  std::int64_t applied, skipped;
};

/// What of a Row the device knows better. Null members: it does not.
struct DeviceRow {
  DeviceNumber lr;             ///< in place of the hyper-parameter `lr`, of a rule that has one
  DeviceNumber rescale;        ///< rescale_grad is multiplied by it
  DeviceNumber step, product;  ///< in place of the progress; they are what comes *before* the step,
                               ///< and advance in place if it is applied
  const Cell* from = nullptr;  ///< the same in the form of a cell,
  Cell* to = nullptr;          ///< which need not be where the advanced one goes: it is written
                               ///< whole, also by a step that is skipped
  /// False: another row of the call has the same `step` and `product`, or `to`, and advances them.
  /// So all rows are read before any is advanced.
  bool advances = true;
};

/// One step of a device. All memory of the tensors, `chunk_sums` too, is on that device. There may
/// be no tensors; rows advance all the same. A joint call has one tree if and only if it has one
/// scope: scopes may differ in a number that only the device knows.
struct DeviceCall {
  StepCall step;          ///< num_threads and executor mean nothing
  const DeviceRow* rows;  ///< [step.num_rows]; `Row::progress.first` counts beside `Cell::fresh`
  const std::uint32_t* scope_rows;  ///< [step.num_scopes] a row with the scope's rescale_grad
  DeviceNumber found_inf;           ///< not 0: the step is skipped
  DeviceNumber grad_scale;          ///< all gradients are divided by it, before rescale_grad
  DeviceNumber given_norm;          ///< as StepCall::given_norms of a joint call
  Counts* counts;                   ///< or null
  bool only_sum;                    ///< only the chunk sums and their sum: nothing is updated
  void* stream;                     ///< CUDA: a cudaStream_t
};

/// What a step did.
struct DeviceReport {
  double norm;       ///< of all scopes together; NaN if nothing asked for it
  double sum;        ///< of squares, of the first tree
  double clip_coef;  ///< the smallest of the rows that have tensors, 1 without any
  std::int64_t first_nonfinite;
  bool skipped, nonfinite;
};

struct DeviceApi {
  static constexpr const char* module = "fusedstep._cuda";
  static constexpr const char* attribute = "_DEVICE_API";
  static constexpr const char* capsule = "fusedstep._cuda._DEVICE_API";  ///< its name
  static constexpr std::uint32_t current_version = 1;

  std::uint32_t version = current_version;
  std::uint32_t table_size = sizeof(DeviceApi);
  std::uint32_t tensor_size = sizeof(Tensor);
  std::uint32_t row_size = sizeof(Row);
  std::uint32_t call_size = sizeof(DeviceCall);
  std::uint32_t report_size = sizeof(DeviceReport);

  // All functions return null, or why nothing was done: a text that stays valid until the next call
  // in this thread. `device` counts from 0.

  /// Whether there is anything to compute on; the number of devices.
  const char* (*status)(int* devices);

  // --- memory ---
  /// Zeroed, for good.
  const char* (*allocate)(int device, std::int64_t bytes, void** out);
  void (*release)(int device, void* memory);
  /// To or from the device, in the order of the stream; done when it returns.
  const char* (*copy_in)(int device, void* stream, void* to, const void* from, std::int64_t bytes);
  const char* (*copy_out)(int device, void* stream, void* to, const void* from, std::int64_t bytes);
  /// Waits for everything, in any stream.
  const char* (*synchronize)(int device);
  const char* (*is_capturing)(int device, void* stream, bool* out);

  // --- steps ---
  /// What belongs to one sequence of steps (an optimizer, or a stream): tables and scratch on the
  /// device. No two steps of one workspace may run at once.
  const char* (*make_workspace)(int device, void** out);
  void (*free_workspace)(void* workspace);
  /// Puts a step into its stream. The report may outlive the workspace, and can be read again and
  /// again until it is freed; one of a captured step tells of the last replay.
  const char* (*step)(void* workspace, const DeviceCall* call, void** report);
  /// Waits for the step, or the last replay of it, which is in `stream`. `tensor_norms` is null or
  /// has room for one per tensor of the call; it is filled if norms were measured.
  const char* (*read_report)(void* report, void* stream, DeviceReport* out, double* tensor_norms);
  /// Also before the step has run.
  void (*free_report)(void* report);

  /// Null, or what of a table differs from what this code was compiled for.
  const char* mismatch() const {
    if (version != current_version) return "another version of the function table";
    const DeviceApi mine{};
    const bool same = table_size == mine.table_size && tensor_size == mine.tensor_size &&
                      row_size == mine.row_size && call_size == mine.call_size &&
                      report_size == mine.report_size;
    return same ? nullptr : "types of other sizes in the function table";
  }
};

}  // namespace fusedstep
