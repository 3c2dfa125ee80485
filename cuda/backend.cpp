// The CUDA backend: its kernels, in the order in which they are tried, and its devices.
#include "backend.h"

#include <cstdint>

#include "host/device_info.h"
#include "host/launch.h"
#include "lora/lora_mma.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

/// A kernel that reads a misaligned element faults, and with it the process's CUDA context:
/// declined here. Wider alignment than an element's own is never needed.
bool has_natural_alignment(const char* what, const void* data, int64_t elem_bytes,
                           std::string* why_not) {
  if (is_aligned(data, static_cast<size_t>(elem_bytes))) return true;
  *why_not = std::string(what) + " is not aligned to its elements of " +
             std::to_string(elem_bytes) + " bytes";
  return false;
}

template <class AnyAbsmax>
bool scales_are_aligned(const AnyAbsmax& absmax, std::string* why_not) {
  constexpr int64_t kBytes = sizeof(float);
  return has_natural_alignment("absmax", absmax.values, kBytes, why_not) &&
         has_natural_alignment("absmax2", absmax.absmax2, kBytes, why_not) &&
         has_natural_alignment("the offset", absmax.offset, kBytes, why_not);
}

bool supports_quantize(const QuantizeArgs& args, std::string* why_not) {
  return has_natural_alignment("the input", args.input.data, size_bytes(args.input.dtype),
                               why_not) &&
         has_natural_alignment("the pinned offset", args.pinned_offset, sizeof(float), why_not) &&
         scales_are_aligned(args.output.absmax, why_not);
}

bool supports_dequantize(const DequantizeArgs& args, std::string* why_not) {
  return has_natural_alignment("the output", args.output.data, size_bytes(args.output.dtype),
                               why_not) &&
         scales_are_aligned(args.weight.absmax, why_not);
}

bool supports_matmul(const MatmulArgs& args, std::string* why_not) {
  const int64_t bytes = size_bytes(args.x.dtype);
  return has_natural_alignment("x", args.x.data, bytes, why_not) &&
         has_natural_alignment("y", args.y.data, bytes, why_not) &&
         has_natural_alignment("the bias", args.bias.data, bytes, why_not) &&
         scales_are_aligned(args.weight.absmax, why_not);
}

/// What all products ask for, and what one kernel does.
template <bool (*kSupports)(const MatmulArgs&, std::string*)>
bool supports_matmul_and(const MatmulArgs& args, std::string* why_not) {
  return supports_matmul(args, why_not) && kSupports(args, why_not);
}

bool supports_matmul_transposed(const MatmulTransposedArgs& args, std::string* why_not) {
  const int64_t bytes = size_bytes(args.dy.dtype);
  return has_natural_alignment("dy", args.dy.data, bytes, why_not) &&
         has_natural_alignment("dx", args.dx.data, bytes, why_not) &&
         scales_are_aligned(args.weight.absmax, why_not);
}

template <bool (*kSupports)(const MatmulTransposedArgs&, std::string*)>
bool supports_transposed_and(const MatmulTransposedArgs& args, std::string* why_not) {
  return supports_matmul_transposed(args, why_not) && kSupports(args, why_not);
}

bool supports_ends(const GroupEnds& ends, std::string* why_not) {
  const int64_t bytes = ends.type == IndexType::kInt32 ? sizeof(int32_t) : sizeof(int64_t);
  return has_natural_alignment("the array of ends of groups", ends.data, bytes, why_not);
}

bool supports_grouped(const GroupedMatmulArgs& args, std::string* why_not) {
  const int64_t bytes = size_bytes(args.x.dtype);
  return has_natural_alignment("x", args.x.data, bytes, why_not) &&
         has_natural_alignment("y", args.y.data, bytes, why_not) &&
         has_natural_alignment("the bias", args.bias.data, bytes, why_not) &&
         supports_ends(args.ends, why_not) &&
         scales_are_aligned(args.weights.first.absmax, why_not);
}

bool supports_grouped_transposed(const GroupedMatmulTransposedArgs& args, std::string* why_not) {
  const int64_t bytes = size_bytes(args.dy.dtype);
  return has_natural_alignment("dy", args.dy.data, bytes, why_not) &&
         has_natural_alignment("dx", args.dx.data, bytes, why_not) &&
         supports_ends(args.ends, why_not) &&
         scales_are_aligned(args.weights.first.absmax, why_not);
}

bool supports_all_of_mma(const GroupedMatmulArgs& args, std::string* why_not) {
  return supports_grouped(args, why_not) && supports_grouped_mma(args, why_not);
}
bool supports_all_of_mma(const GroupedMatmulTransposedArgs& args, std::string* why_not) {
  return supports_grouped_transposed(args, why_not) &&
         supports_grouped_transposed_mma(args, why_not);
}

bool are_elements_aligned(const OptimizerTensor& tensor) {
  const size_t state_bytes = tensor.state_format == StateFormat::kFloat32 ? sizeof(float) : 1;
  const auto is_float_aligned = [](const void* data) { return is_aligned(data, sizeof(float)); };
  return is_aligned(tensor.param, static_cast<size_t>(size_bytes(tensor.param_dtype))) &&
         is_aligned(tensor.grad, static_cast<size_t>(size_bytes(tensor.grad_dtype))) &&
         is_aligned(tensor.state1, state_bytes) && is_aligned(tensor.state2, state_bytes) &&
         is_float_aligned(tensor.absmax1) && is_float_aligned(tensor.absmax2) &&
         is_float_aligned(tensor.master) && is_float_aligned(tensor.step);
}

bool supports_optimizer_step(const OptimizerStepArgs& args, std::string* why_not) {
  for (size_t i = 0; i < args.tensors.size(); ++i) {
    if (are_elements_aligned(args.tensors[i])) continue;
    *why_not = "an array of tensor " + std::to_string(i) + " is not aligned to its elements";
    return false;
  }
  return true;
}

bool supports_gradient_norm(const GradientNormArgs& args, std::string* why_not) {
  for (const VectorView& grad : args.grads) {
    if (!has_natural_alignment("a gradient", grad.data, size_bytes(grad.dtype), why_not)) {
      return false;
    }
  }
  return has_natural_alignment("the norm", args.norm, sizeof(float), why_not);
}

template <class View>
bool is_matrix_aligned(const char* what, const View& view, std::string* why_not) {
  return has_natural_alignment(what, view.data, size_bytes(view.dtype), why_not);
}

bool supports_lora_project(const LoraProjectArgs& args, std::string* why_not) {
  return is_matrix_aligned("x", args.x, why_not) &&
         is_matrix_aligned("the factor", args.factor, why_not) &&
         is_matrix_aligned("t", args.t, why_not);
}

bool supports_lora_update(const LoraUpdateArgs& args, std::string* why_not) {
  return is_matrix_aligned("t", args.t, why_not) &&
         is_matrix_aligned("the factor", args.factor, why_not) &&
         is_matrix_aligned("y", args.y, why_not);
}

bool supports_lora_gradient(const LoraGradientArgs& args, std::string* why_not) {
  return is_matrix_aligned("s", args.s, why_not) && is_matrix_aligned("v", args.v, why_not) &&
         is_matrix_aligned("grad", args.grad, why_not);
}

template <class Args, auto kAligned, auto kSuits>
bool supports_lora_mma(const Args& args, std::string* why_not) {
  return kAligned(args, why_not) && kSuits(args, why_not);
}

constexpr KernelEntry<QuantizeArgs> kQuantizeKernels[] = {
    {.name = "simt",
     .usable = is_usable,
     .supports = supports_quantize,
     .workspace_bytes = quantize_simt_workspace_bytes,
     .run = quantize_simt},
};

constexpr KernelEntry<DequantizeArgs> kDequantizeKernels[] = {
    {.name = "simt", .usable = is_usable, .supports = supports_dequantize, .run = dequantize_simt},
};

constexpr KernelEntry<MatmulArgs> kMatmulKernels[] = {
    {.name = "gemv_mma",
     .usable = is_gemv_mma_usable,
     .supports = supports_matmul_and<supports_gemv_mma>,
     .run = gemv_mma},
    {.name = "gemm_sm90a",
     .usable = is_gemm_sm90a_usable,
     .supports = supports_matmul_and<supports_gemm_sm90a>,
     .prefers = prefers_gemm_sm90a,
     .workspace_bytes = gemm_sm90a_workspace_bytes,
     .run = gemm_sm90a,
     .dense_is_faster_for = dense_beats_gemm_sm90a},
    {.name = "gemm_mma",
     .usable = is_gemm_mma_usable,
     .supports = supports_matmul_and<supports_gemm_mma>,
     .prefers = prefers_gemm_mma,
     .workspace_bytes = gemm_mma_workspace_bytes,
     .run = gemm_mma},
    {.name = "gemv_simt",
     .usable = is_usable,
     .supports = supports_matmul,
     .prefers = prefers_gemv,
     .run = gemv_simt},
    {.name = "gemm_sm80",
     .usable = is_usable,
     .supports = supports_matmul_and<supports_gemm_sm80>,
     .workspace_bytes = gemm_sm80_workspace_bytes,
     .run = gemm_sm80,
     .dense_is_faster_for = dense_beats_gemm_sm80},
    {.name = "gemm_simt",
     .usable = is_usable,
     .supports = supports_matmul,
     .run = gemm_simt,
     .dense_is_faster = true},
};

constexpr KernelEntry<MatmulTransposedArgs> kMatmulTransposedKernels[] = {
    {.name = "gemm_sm90a",
     .usable = is_gemm_sm90a_usable,
     .supports = supports_transposed_and<supports_gemm_transposed_sm90a>,
     .workspace_bytes = gemm_transposed_sm90a_workspace_bytes,
     .run = gemm_transposed_sm90a,
     .dense_is_faster_for = dense_beats_gemm_transposed_sm90a},
    {.name = "gemm_sm80",
     .usable = is_usable,
     .supports = supports_transposed_and<supports_gemm_transposed_sm80>,
     .workspace_bytes = gemm_transposed_sm80_workspace_bytes,
     .run = gemm_transposed_sm80,
     .dense_is_faster_for = dense_beats_gemm_transposed_sm80},
    {.name = "gemm_simt",
     .usable = is_usable,
     .supports = supports_matmul_transposed,
     .run = gemm_transposed_simt,
     .dense_is_faster = true},
};

constexpr KernelEntry<GroupedMatmulArgs> kGroupedMatmulKernels[] = {
    {.name = "mma",
     .usable = is_usable,
     .supports = supports_all_of_mma,
     .run = grouped_matmul_mma},
    {.name = "simt", .usable = is_usable, .supports = supports_grouped, .run = grouped_matmul_simt},
};

constexpr KernelEntry<GroupedMatmulTransposedArgs> kGroupedMatmulTransposedKernels[] = {
    {.name = "mma",
     .usable = is_usable,
     .supports = supports_all_of_mma,
     .run = grouped_matmul_transposed_mma},
    {.name = "simt",
     .usable = is_usable,
     .supports = supports_grouped_transposed,
     .run = grouped_matmul_transposed_simt},
};

constexpr KernelEntry<OptimizerStepArgs> kOptimizerStepKernels[] = {
    {.name = "simt",
     .usable = is_usable,
     .supports = supports_optimizer_step,
     .workspace_bytes = optimizer_step_simt_workspace_bytes,
     .run = optimizer_step_simt},
};

constexpr KernelEntry<GradientNormArgs> kGradientNormKernels[] = {
    {.name = "simt",
     .usable = is_usable,
     .supports = supports_gradient_norm,
     .workspace_bytes = gradient_norm_simt_workspace_bytes,
     .run = gradient_norm_simt},
};

constexpr KernelEntry<LoraProjectArgs> kLoraProjectKernels[] = {
    {.name = "mma",
     .usable = is_usable,
     .supports =
         supports_lora_mma<LoraProjectArgs, supports_lora_project, supports_lora_project_mma>,
     .workspace_bytes = lora_project_mma_workspace_bytes,
     .run = lora_project_mma,
     .dense_is_faster = true},
    {.name = "simt",
     .usable = is_usable,
     .supports = supports_lora_project,
     .run = lora_project_simt,
     .dense_is_faster = true},
};

constexpr KernelEntry<LoraUpdateArgs> kLoraUpdateKernels[] = {
    {.name = "mma",
     .usable = is_usable,
     .supports = supports_lora_mma<LoraUpdateArgs, supports_lora_update, supports_lora_update_mma>,
     .workspace_bytes = lora_update_mma_workspace_bytes,
     .run = lora_update_mma,
     .dense_is_faster = true},
    {.name = "simt",
     .usable = is_usable,
     .supports = supports_lora_update,
     .run = lora_update_simt,
     .dense_is_faster = true},
};

constexpr KernelEntry<LoraGradientArgs> kLoraGradientKernels[] = {
    {.name = "mma",
     .usable = is_usable,
     .supports =
         supports_lora_mma<LoraGradientArgs, supports_lora_gradient, supports_lora_gradient_mma>,
     .run = lora_gradient_mma,
     .dense_is_faster = true},
    {.name = "simt",
     .usable = is_usable,
     .supports = supports_lora_gradient,
     .run = lora_gradient_simt,
     .dense_is_faster = true},
};

}  // namespace

const Backend& backend() {
  static const Backend backend{
      .type = DeviceType::kCuda,
      .quantize = kQuantizeKernels,
      .dequantize = kDequantizeKernels,
      .matmul = kMatmulKernels,
      .matmul_transposed = kMatmulTransposedKernels,
      .optimizer_step = kOptimizerStepKernels,
      .gradient_norm = kGradientNormKernels,
      .lora_project = kLoraProjectKernels,
      .lora_update = kLoraUpdateKernels,
      .lora_gradient = kLoraGradientKernels,
      .grouped_matmul = kGroupedMatmulKernels,
      .grouped_matmul_transposed = kGroupedMatmulTransposedKernels,
      .list_devices = list_devices,
      .unavailable_reason = unavailable_reason,
  };
  return backend;
}

}  // namespace qlora_native::cuda
