// The CUDA devices of this machine and whether the kernels run on them.
#pragma once

#include <cstdint>
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

/// Multiprocessors of a usable device.
int processor_count(Device device);

/// Shared memory of one of them, in bytes.
int64_t processor_shared_bytes(Device device);

/// Of a usable device: 80 for 8.0.
int compute_capability(Device device);

/// Whether a usable device is of compute capability 9.x, for which alone sm_90a code is; if not, says why in
/// `*why_not`.
bool is_hopper(Device device, std::string* why_not);

/// Whether a usable device, and the library's code for it, is of compute capability 9.0 or more, and
/// lets a thread block have `shared_bytes` of shared memory; if not, says why in `*why_not`.
bool has_hopper_resources(Device device, int64_t shared_bytes, std::string* why_not);

}  // namespace qlora_native::cuda
