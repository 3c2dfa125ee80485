// Which kernels a command is to measure.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "qlora_native/kernels.h"

namespace bench {

/// For --kernel: {""}, the library's choice, for an empty name; all that this machine can run for
/// "all"; else the name itself, or nothing when `op` has no such kernel.
std::vector<std::string> kernels_to_measure(qlora_native::Op op, qlora_native::DeviceType device,
                                            const std::string& asked_for);

/// Throws std::invalid_argument, listing the kernels that `ops` have.
[[noreturn]] void refuse_kernel(std::span<const qlora_native::Op> ops,
                                qlora_native::DeviceType device, const std::string& asked_for);

/// Lets the library choose again, for every operation.
void unforce_kernels(qlora_native::DeviceType device);

}  // namespace bench
