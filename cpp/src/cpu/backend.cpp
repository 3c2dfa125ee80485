// The CPU backend: its kernels, in the order in which they are tried, and its one device.
#include "backend.h"

#include <cfenv>

#include "cpu/cpu_features.h"
#include "cpu/kernels.h"

namespace qlora_native::cpu {
namespace {

/// Restores the default rounding mode and turns flush-to-zero off for the length of a call: the same
/// input must give the same bytes in a process that has set them, as torch.set_flush_denormal does.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&callers_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t callers_;
};

bool always_usable(Device, std::string*) { return true; }

template <EncodeBlocksFn kEncode>
void quantize(const QuantizeArgs& args, Workspace workspace, Stream) {
  const DefaultFloatEnvironment environment;
  run_quantize(args, workspace, kEncode);
}

template <DecodeBlocksFn kDecode>
void dequantize(const DequantizeArgs& args, Workspace, Stream) {
  const DefaultFloatEnvironment environment;
  run_dequantize(args, kDecode);
}

template <class Args, void (*kRun)(const Args&)>
void product(const Args& args, Workspace, Stream) {
  const DefaultFloatEnvironment environment;
  kRun(args);
}

constexpr KernelEntry<QuantizeArgs> kQuantize[] = {
    {.name = "scalar",
     .usable = always_usable,
     .workspace_bytes = quantize_workspace_bytes,
     .run = quantize<encode_blocks_scalar>},
};

constexpr KernelEntry<DequantizeArgs> kDequantize[] = {
    {.name = "scalar", .usable = always_usable, .run = dequantize<decode_blocks_scalar>},
};

constexpr KernelEntry<MatmulArgs> kMatmul[] = {
    {.name = "scalar", .usable = always_usable, .run = product<MatmulArgs, matmul_scalar>},
};

constexpr KernelEntry<MatmulTransposedArgs> kMatmulTransposed[] = {
    {.name = "scalar",
     .usable = always_usable,
     .run = product<MatmulTransposedArgs, matmul_transposed_scalar>},
};

std::vector<DeviceInfo> list_devices() {
  const CpuFeatures& features = cpu_features();
  return {{Device::cpu(), features.brand, to_string(features), physical_memory_bytes()}};
}

}  // namespace

const Backend& backend() {
  static constexpr Backend kBackend = {
      .type = DeviceType::kCpu,
      .quantize = kQuantize,
      .dequantize = kDequantize,
      .matmul = kMatmul,
      .matmul_transposed = kMatmulTransposed,
      .list_devices = list_devices,
      .unavailable_reason = [] { return std::string(); },
  };
  return kBackend;
}

}  // namespace qlora_native::cpu
