#include "support/kernel_runs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "support/device_memory.h"

namespace qlora_native::testing {

std::vector<Device> test_devices() {
  std::vector<Device> devices = {Device::cpu()};
  if (cuda_available()) {
    devices.push_back(Device::cuda(0));
  } else if (std::getenv("QLORA_NATIVE_REQUIRE_CUDA") != nullptr) {
    throw std::runtime_error(
        "QLORA_NATIVE_REQUIRE_CUDA is set, but these tests see no CUDA device: " +
        cuda_unavailable_reason());
  }
  return devices;
}

std::vector<std::string> usable_kernels(Op op, Device device) {
  std::vector<std::string> names;
  for (const KernelInfo& info : list_kernels()) {
    if (info.op == op && info.device == device.type && info.usable) names.push_back(info.name);
  }
  return names;
}

ForcedKernel::ForcedKernel(Op op, DeviceType device, const std::string& name)
    : op_(op), device_(device) {
  force_kernel(op, device, name);
}

ForcedKernel::~ForcedKernel() { force_kernel(op_, device_, ""); }

std::vector<std::string> for_each_kernel(Op op, Device device, const std::function<void()>& body) {
  std::vector<std::string> ran;
  for (const std::string& kernel : usable_kernels(op, device)) {
    SCOPED_TRACE(std::string(name(op)) + " on " + to_string(device) + " by " + kernel);
    const ForcedKernel forced(op, device.type, kernel);
    try {
      body();
    } catch (const Unsupported&) {
      continue;
    }
    EXPECT_EQ(last_kernel(op), kernel);
    ran.push_back(kernel);
  }
  EXPECT_FALSE(ran.empty()) << "no kernel of " << name(op) << " took the case on "
                            << to_string(device);
  SCOPED_TRACE(std::string(name(op)) + " on " + to_string(device) + ", automatic choice");
  body();
  return ran;
}

void expect_ran_if_usable(const std::string& gpu_kernel, Op op,
                          const std::vector<std::string>& ran) {
  if (!cuda_available()) return;
  for (const std::string& usable : usable_kernels(op, Device::cuda(0))) {
    if (usable != gpu_kernel) continue;
    EXPECT_NE(std::find(ran.begin(), ran.end(), gpu_kernel), ran.end())
        << gpu_kernel << " declined a case of " << name(op) << " that is there for it";
  }
}

}  // namespace qlora_native::testing
