#include "host/device_info.h"

#include <cuda_runtime_api.h>

#include "host/compiled_architecture.h"

namespace qlora_native::cuda {
namespace {

constexpr int kMinComputeCapabilityMajor = 8;

struct DeviceProperties {
  std::string name;
  int major = 0;
  int minor = 0;
  int multiprocessors = 0;
  int64_t memory_bytes = 0;
  int64_t max_shared_bytes = 0;        ///< of a thread block that asks for it
  int64_t processor_shared_bytes = 0;  ///< of all thread blocks of a processor
  std::string why_not;                 ///< empty when the kernels run on it
};

struct Inventory {
  std::vector<DeviceProperties> devices;
  std::string reason;  ///< why there are no devices at all
};

/// The text of a failed query. Also clears the runtime's "last error", which is not the caller's.
std::string describe(cudaError_t status) {
  static_cast<void>(cudaGetLastError());
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

DeviceProperties query_device(int index) {
  DeviceProperties device;
  cudaDeviceProp properties{};
  if (const cudaError_t status = cudaGetDeviceProperties(&properties, index);
      status != cudaSuccess) {
    device.why_not = "its properties cannot be read: " + describe(status);
    return device;
  }
  device.name = properties.name;
  device.major = properties.major;
  device.minor = properties.minor;
  device.multiprocessors = properties.multiProcessorCount;
  device.max_shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  device.processor_shared_bytes = static_cast<int64_t>(properties.sharedMemPerMultiprocessor);
  device.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  if (device.major < kMinComputeCapabilityMajor) {
    device.why_not = "needs compute capability 8.0 or more, " + device.name + " has " +
                     std::to_string(device.major) + "." + std::to_string(device.minor);
  }
  return device;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

/// Why cudaGetDeviceCount failed. The runtime words a missing driver as an old one.
std::string describe_missing_devices(cudaError_t status) {
  int driver_version = 0;
  if (status != cudaErrorInsufficientDriver ||
      cudaDriverGetVersion(&driver_version) != cudaSuccess) {
    return describe(status);
  }
  static_cast<void>(cudaGetLastError());
  if (driver_version == 0) return "no NVIDIA driver is installed";
  return "the NVIDIA driver supports CUDA " + version_text(driver_version) +
         ", this build needs CUDA " + version_text(CUDART_VERSION);
}

Inventory query_inventory() {
  Inventory inventory;
  int count = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) {
    inventory.reason = describe_missing_devices(status);
    return inventory;
  }
  for (int index = 0; index < count; ++index) inventory.devices.push_back(query_device(index));
  if (inventory.devices.empty()) inventory.reason = "the CUDA driver reports no device";
  return inventory;
}

const Inventory& inventory() {
  static const Inventory inventory = query_inventory();
  return inventory;
}

}  // namespace

std::vector<DeviceInfo> list_devices() {
  std::vector<DeviceInfo> infos;
  int32_t index = 0;
  for (const DeviceProperties& device : inventory().devices) {
    if (device.why_not.empty()) {
      infos.push_back({Device::cuda(index), device.name,
                       "sm_" + std::to_string(device.major) + std::to_string(device.minor) + ", " +
                           std::to_string(device.multiprocessors) + " SMs",
                       device.memory_bytes});
    }
    ++index;
  }
  return infos;
}

std::string unavailable_reason() {
  if (!list_devices().empty()) return "";
  std::string reason = inventory().reason;
  for (const DeviceProperties& device : inventory().devices) {
    reason += (reason.empty() ? "" : "; ") + device.why_not;
  }
  return reason;
}

bool is_usable(Device device, std::string* why_not) {
  const std::vector<DeviceProperties>& devices = inventory().devices;
  if (devices.empty()) {
    *why_not = inventory().reason;
    return false;
  }
  if (device.index < 0 || static_cast<size_t>(device.index) >= devices.size()) {
    *why_not = "there is no " + to_string(device) + ", only " + std::to_string(devices.size()) +
               " CUDA device(s)";
    return false;
  }
  *why_not = devices[static_cast<size_t>(device.index)].why_not;
  return why_not->empty();
}

int processor_count(Device device) {
  return inventory().devices.at(static_cast<size_t>(device.index)).multiprocessors;
}

int64_t processor_shared_bytes(Device device) {
  return inventory().devices.at(static_cast<size_t>(device.index)).processor_shared_bytes;
}

int compute_capability(Device device) {
  const DeviceProperties& properties = inventory().devices.at(static_cast<size_t>(device.index));
  return properties.major * 10 + properties.minor;
}

bool is_hopper(Device device, std::string* why_not) {
  const DeviceProperties& properties = inventory().devices.at(static_cast<size_t>(device.index));
  if (properties.major == 9) return true;
  *why_not = "is for compute capability 9.0, " + properties.name + " has " +
             std::to_string(properties.major) + "." + std::to_string(properties.minor);
  return false;
}

bool has_hopper_resources(Device device, int64_t shared_bytes, std::string* why_not) {
  const DeviceProperties& properties = inventory().devices.at(static_cast<size_t>(device.index));
  if (properties.major < 9) {
    *why_not = "needs compute capability 9.0 or more, " + properties.name + " has " +
               std::to_string(properties.major) + "." + std::to_string(properties.minor);
    return false;
  }
  if (!is_compiled_for_hopper(device.index)) {
    *why_not = "this build has no code for compute capability 9.0";
    return false;
  }
  if (properties.max_shared_bytes < shared_bytes) {
    *why_not = "needs " + std::to_string(shared_bytes) + " bytes of shared memory per block, " +
               properties.name + " has " + std::to_string(properties.max_shared_bytes);
    return false;
  }
  return true;
}

}  // namespace qlora_native::cuda
