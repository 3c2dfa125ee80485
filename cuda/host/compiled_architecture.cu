#include "host/compiled_architecture.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "host/launch.h"

namespace qlora_native::cuda {
namespace {

constexpr int kHopper = 90;
constexpr int kMaxDevices = 64;

/// Compiled as all kernels are, and asked in their place.
__global__ void representative_kernel() {}

bool ask_driver(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, representative_kernel);
  if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
  return status == cudaSuccess && attributes.ptxVersion >= kHopper;
}

}  // namespace

bool is_compiled_for_hopper(int device) {
  enum Answer : uint8_t { kNotAsked, kNo, kYes };
  static std::array<std::atomic<uint8_t>, kMaxDevices> answers{};
  if (device >= kMaxDevices) return ask_driver(device);
  std::atomic<uint8_t>& answer = answers[static_cast<size_t>(device)];
  if (answer.load(std::memory_order_relaxed) == kNotAsked) {
    answer.store(ask_driver(device) ? kYes : kNo, std::memory_order_relaxed);
  }
  return answer.load(std::memory_order_relaxed) == kYes;
}

}  // namespace qlora_native::cuda
