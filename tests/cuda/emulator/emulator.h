#pragma once
#include <stdint.h>

/// How tests direct the emulator. (Python calls these through ctypes.)
#if defined(__cplusplus)
extern "C" {
#endif
#define EMULATOR_CONTROL __attribute__((visibility("default")))

/// As after loading: everything that is put into streams is run; settings, counts and faults are
/// forgotten. What has been allocated or registered stays.
EMULATOR_CONTROL void emulator_reset();

/// Settings by name; -1 if there is none of that name.
///
/// `order`: of the threads in a block and of the blocks in a grid: 0 forward, 1 backward, 2 random.
/// `seed`: of everything random.
/// `workers`: how many blocks may run at once.
/// `streams`: when the operations of a stream run: 0 when something waits for them, 1 at once, 2 at
///   random, but in time.
/// `devices`, `driver_version` (0: there is none), `capability` (e.g. 90), `multiprocessors`,
/// `blocks_per_multiprocessor`, `memory` (bytes, of all devices together): what the machine has.
EMULATOR_CONTROL int emulator_set(const char* setting, int64_t value);
EMULATOR_CONTROL int64_t emulator_get(const char* setting);

/// Runs all that is in all streams.
EMULATOR_CONTROL void emulator_run();

/// The `nth` call (1 is the next) of a function returns `error` and does nothing else. The function
/// "kernel" is the execution of a kernel: its error is found later, and stays until a reset, as
/// that of a kernel that accessed a wrong address.
EMULATOR_CONTROL void emulator_fail(const char* function, int64_t nth, int error);

/// Calls of a function since the reset, refused ones too.
EMULATOR_CONTROL int64_t emulator_calls(const char* function);

/// Counts since the reset: `launched` and `executed` kernels (replays of graphs are executed only),
/// `bytes_copied`, `bytes_set`, `kernel_errors`; and of now: `pending` operations, `allocations`,
/// `allocated_bytes`, `broken_guards` of allocations. -1 if there is none of that name.
EMULATOR_CONTROL int64_t emulator_count(const char* what);

/// The name of a launched kernel, by the order of launches; null after the last.
EMULATOR_CONTROL const char* emulator_launched(int64_t index);
/// The same for executions.
EMULATOR_CONTROL const char* emulator_executed(int64_t index);

/// What was done wrong first since the reset, by a kernel or by a caller; null if nothing was.
EMULATOR_CONTROL const char* emulator_fault();

/// Declares memory of a test to be memory of a device; as often as it is declared, it has to be
/// undeclared.
EMULATOR_CONTROL void emulator_register(const void* memory, int64_t bytes, int device);
EMULATOR_CONTROL void emulator_unregister(const void* memory);

#if defined(__cplusplus)
}
#endif
