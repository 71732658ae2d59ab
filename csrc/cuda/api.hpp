#pragma once
#include "core/device.hpp"

namespace fusedstep::cuda {

/// The functions of this backend, for good.
const DeviceApi& device_api();

}  // namespace fusedstep::cuda
