#pragma once
#include "core/device.hpp"

namespace fusedstep::cuda {

/// The functions of this backend, for good.
const DeviceApi& device_api();

/// The order in which update kernels visit the chunks, which changes no bits: for measurements.
/// Returns what it was.
bool set_backward(bool backward);

}  // namespace fusedstep::cuda
