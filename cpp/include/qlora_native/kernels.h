// The kernels behind each operation: list them, ask which one would run, force one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "qlora_native/dequantize.h"
#include "qlora_native/device.h"
#include "qlora_native/export.h"
#include "qlora_native/grouped_matmul.h"
#include "qlora_native/lora.h"
#include "qlora_native/matmul.h"
#include "qlora_native/optimizer.h"
#include "qlora_native/quantize.h"

namespace qlora_native {

enum class Op : int32_t {
  kQuantize4bit = 0,
  kDequantize4bit,
  kMatmul4bit,
  kMatmul4bitTransposed,
  kOptimizerStep,
  kGradientNorm,
  kLoraProject,
  kLoraUpdate,
  kLoraGradient,
  kGroupedMatmul4bit,
  kGroupedMatmul4bitTransposed
};
inline constexpr Op kAllOps[] = {Op::kQuantize4bit,
                                 Op::kDequantize4bit,
                                 Op::kMatmul4bit,
                                 Op::kMatmul4bitTransposed,
                                 Op::kOptimizerStep,
                                 Op::kGradientNorm,
                                 Op::kLoraProject,
                                 Op::kLoraUpdate,
                                 Op::kLoraGradient,
                                 Op::kGroupedMatmul4bit,
                                 Op::kGroupedMatmul4bitTransposed};

/// "quantize_4bit", "dequantize_4bit", "matmul_4bit", "matmul_4bit_transposed", "optimizer_step",
/// "gradient_norm", "lora_project", "lora_update", "lora_gradient", "grouped_matmul_4bit",
/// "grouped_matmul_4bit_transposed".
QN_API const char* name(Op op);

struct KernelInfo {
  Op op;
  DeviceType device;
  std::string name;     ///< e.g. "avx512"; unique within an op and a device type
  bool usable = false;  ///< whether this machine's hardware can run it at all
  std::string why_not;  ///< when not usable
};

/// Every kernel of this build, in the order in which they are tried. Never throws for lack of a
/// GPU.
QN_API std::vector<KernelInfo> list_kernels();

/// From now on, in the whole process, `op` on devices of type `device` runs the kernel
/// `kernel_name` or throws Unsupported; an empty name restores the automatic choice. For tests and
/// measurements. Throws InvalidArgument, listing the kernels there are, when there is none of that
/// name.
QN_API void force_kernel(Op op, DeviceType device, const std::string& kernel_name);

/// The name in force, "" for the automatic choice.
QN_API std::string forced_kernel(Op op, DeviceType device);

/// The kernel that the process's last call of `op` ran, "" before the first.
QN_API std::string last_kernel(Op op);

/// The kernel that the operation would run for these arguments. Reads no array but, on a CPU, the
/// ends of groups. Throws as the operation does.
QN_API std::string selected_kernel(const QuantizeArgs& args);
QN_API std::string selected_kernel(const DequantizeArgs& args);
QN_API std::string selected_kernel(const MatmulArgs& args);
QN_API std::string selected_kernel(const MatmulTransposedArgs& args);
QN_API std::string selected_kernel(const OptimizerStepArgs& args);
QN_API std::string selected_kernel(const GradientNormArgs& args);
QN_API std::string selected_kernel(const LoraProjectArgs& args);
QN_API std::string selected_kernel(const LoraUpdateArgs& args);
QN_API std::string selected_kernel(const LoraGradientArgs& args);
QN_API std::string selected_kernel(const GroupedMatmulArgs& args);
QN_API std::string selected_kernel(const GroupedMatmulTransposedArgs& args);

}  // namespace qlora_native
