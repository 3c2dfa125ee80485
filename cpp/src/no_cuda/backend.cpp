// Takes the place of cuda/backend.cpp in a build without CUDA.
#include "backend.h"

namespace qlora_native::cuda {

const Backend& backend() {
  static const Backend backend{
      .type = DeviceType::kCuda,
      .quantize = {},
      .dequantize = {},
      .matmul = {},
      .matmul_transposed = {},
      .list_devices = [] { return std::vector<DeviceInfo>{}; },
      .unavailable_reason =
          [] { return std::string("this build of qlora_native has no CUDA backend"); },
  };
  return backend;
}

}  // namespace qlora_native::cuda
