// The CUDA devices of this machine and whether the kernels run on them.
#pragma once

#include <string>
#include <vector>

#include "qlora_native/device.h"

namespace qlora_native::cuda {

/// Every device whose compute capability the kernels support. Does not throw, and makes no context
/// on any device. The driver is asked once per process, at the first call.
std::vector<DeviceInfo> list_devices();

/// Why `list_devices()` is empty: the driver's message, or what each device lacks. "" when it is
/// not.
std::string unavailable_reason();

/// Whether `device` exists and has compute capability 8.0 or more; if not, says why in `*why_not`.
bool is_usable(Device device, std::string* why_not);

}  // namespace qlora_native::cuda
