// Takes the place of cuda/backend.cpp in a build without CUDA.
#include "backend.h"

#include "qlora_native/error.h"

namespace qlora_native::cuda {
namespace {

std::string missing() { return "this build of qlora_native has no CUDA backend"; }

}  // namespace

const Backend& backend() {
  static const Backend backend{
      .type = DeviceType::kCuda,
      .quantize = {},
      .dequantize = {},
      .matmul = {},
      .matmul_transposed = {},
      .optimizer_step = {},
      .gradient_norm = {},
      .lora_project = {},
      .lora_update = {},
      .lora_gradient = {},
      .grouped_matmul = {},
      .grouped_matmul_transposed = {},
      .list_devices = [] { return std::vector<DeviceInfo>{}; },
      .unavailable_reason = missing,
  };
  return backend;
}

const PagedMemoryTable& paged_memory() {
  static constexpr PagedMemoryTable kTable{
      .choose_backing = [](Device) -> BackingChoice { throw InvalidArgument(missing()); },
      .make_driver = [](Device, Backing) -> std::unique_ptr<PagedDriver> {
        throw InvalidArgument(missing());
      }};
  return kTable;
}

}  // namespace qlora_native::cuda
