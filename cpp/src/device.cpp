#include "qlora_native/device.h"

#include "backend.h"

namespace qlora_native {

std::string to_string(Device device) {
  return device.is_cpu() ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::vector<DeviceInfo> list_devices() {
  std::vector<DeviceInfo> devices = backend_for(DeviceType::kCpu).list_devices();
  for (DeviceInfo& info : backend_for(DeviceType::kCuda).list_devices()) {
    devices.push_back(std::move(info));
  }
  return devices;
}

std::string cuda_unavailable_reason() {
  return backend_for(DeviceType::kCuda).unavailable_reason();
}

}  // namespace qlora_native
