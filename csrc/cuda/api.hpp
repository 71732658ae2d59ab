#pragma once
#include "core/device.hpp"

namespace fusedstep::cuda {

/// What the bindings call; engine.cu and memory.cu have the functions.
extern const DeviceApi device_api;

}  // namespace fusedstep::cuda
