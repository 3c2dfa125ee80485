// Running one test body on every device and every kernel.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "qlora_native/qlora_native.h"

namespace qlora_native::testing {

/// The CPU, and the first GPU when there is one. Throws when there is none though the environment
/// variable QLORA_NATIVE_REQUIRE_CUDA is set: a run on a GPU must not pass without it.
std::vector<Device> test_devices();

/// Kernels of `op` that the machine's `device` can run.
std::vector<std::string> usable_kernels(Op op, Device device);

/// Runs `body` once for each usable kernel, with that kernel forced, and once with the automatic
/// choice. A kernel that declines the case (Unsupported) is skipped; at least one must take it, and
/// the one that ran must be the one that was forced. Returns the names of those that ran.
std::vector<std::string> for_each_kernel(Op op, Device device, const std::function<void()>& body);

/// Fails if a GPU kernel of `op` that the machine can run is not among those that `ran`.
void expect_ran_if_usable(const std::string& gpu_kernel, Op op,
                          const std::vector<std::string>& ran);

/// Forces a kernel for the length of a scope.
class ForcedKernel {
 public:
  ForcedKernel(Op op, DeviceType device, const std::string& name);
  ~ForcedKernel();
  ForcedKernel(const ForcedKernel&) = delete;
  ForcedKernel& operator=(const ForcedKernel&) = delete;

 private:
  Op op_;
  DeviceType device_;
};

}  // namespace qlora_native::testing
