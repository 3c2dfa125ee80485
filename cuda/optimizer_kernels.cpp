#include "optimizer_kernels.h"

#include <string>

#include "host/device_info.h"
#include "host/launch.h"

namespace qlora_native::cuda {
namespace {

/// A kernel that reads a misaligned element faults, and with it the process's CUDA context:
/// declined here.
bool are_elements_aligned(const OptimizerTensor& tensor) {
  const size_t state_bytes = tensor.state_format == StateFormat::kFloat32 ? sizeof(float) : 1;
  const auto is_float_aligned = [](const void* data) { return is_aligned(data, sizeof(float)); };
  return is_aligned(tensor.param, static_cast<size_t>(size_bytes(tensor.param_dtype))) &&
         is_aligned(tensor.grad, static_cast<size_t>(size_bytes(tensor.grad_dtype))) &&
         is_aligned(tensor.state1, state_bytes) && is_aligned(tensor.state2, state_bytes) &&
         is_float_aligned(tensor.absmax1) && is_float_aligned(tensor.absmax2) &&
         is_float_aligned(tensor.master) && is_float_aligned(tensor.step);
}

bool supports_step(const OptimizerStepArgs& args, std::string* why_not) {
  for (size_t i = 0; i < args.tensors.size(); ++i) {
    if (are_elements_aligned(args.tensors[i])) continue;
    *why_not = "an array of tensor " + std::to_string(i) + " is not aligned to its elements";
    return false;
  }
  return true;
}

bool supports_norm(const GradientNormArgs& args, std::string* why_not) {
  for (size_t i = 0; i < args.grads.size(); ++i) {
    const VectorView& grad = args.grads[i];
    if (is_aligned(grad.data, static_cast<size_t>(size_bytes(grad.dtype)))) continue;
    *why_not = "gradient " + std::to_string(i) + " is not aligned to its elements";
    return false;
  }
  if (is_aligned(args.norm, sizeof(float))) return true;
  *why_not = "the norm is not aligned to 4 bytes";
  return false;
}

constexpr KernelEntry<OptimizerStepArgs> kOptimizerStep[] = {
    {.name = "simt",
     .usable = is_usable,
     .supports = supports_step,
     .workspace_bytes = optimizer_step_simt_workspace_bytes,
     .run = optimizer_step_simt},
};

constexpr KernelEntry<GradientNormArgs> kGradientNorm[] = {
    {.name = "simt",
     .usable = is_usable,
     .supports = supports_norm,
     .workspace_bytes = gradient_norm_simt_workspace_bytes,
     .run = gradient_norm_simt},
};

}  // namespace

KernelTable<OptimizerStepArgs> optimizer_step_kernels() { return kOptimizerStep; }
KernelTable<GradientNormArgs> gradient_norm_kernels() { return kGradientNorm; }

}  // namespace qlora_native::cuda
