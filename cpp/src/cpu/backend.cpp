// The CPU backend: its kernels, in the order in which they are tried, and its one device.
#include "backend.h"

#include <type_traits>

#include "cpu/float_environment.h"
#include "cpu/kernels.h"
#include "cpu/predicates.h"

namespace qlora_native::cpu {
namespace {

template <EncodeBlocksFn kEncode>
void quantize(const QuantizeArgs& args, Workspace workspace, Stream) {
  const DefaultFloatScope float_scope;
  run_quantize(args, workspace, kEncode);
}

template <DecodeBlocksFn kDecode>
void dequantize(const DequantizeArgs& args, Workspace, Stream) {
  const DefaultFloatScope float_scope;
  run_dequantize(args, kDecode);
}

template <class Args, void (*kRun)(const Args&, Workspace)>
void product(const Args& args, Workspace workspace, Stream) {
  const DefaultFloatScope float_scope;
  kRun(args, workspace);
}

template <StepElementsFn kStep>
void step(const OptimizerStepArgs& args, Workspace workspace, Stream) {
  const DefaultFloatScope float_scope;
  run_optimizer_step(args, workspace, kStep);
}

void norm(const GradientNormArgs& args, Workspace workspace, Stream) {
  const DefaultFloatScope float_scope;
  gradient_norm_scalar(args, workspace);
}

#if defined(QN_CPU_X86)
template <class Args>
using ProductFn = void (*)(const Args&, Workspace);
using UsableFn = bool (*)(Device, std::string*);

int64_t product_workspace_bytes(const MatmulArgs& args) { return matmul_workspace_bytes(args); }
int64_t product_workspace_bytes(const MatmulTransposedArgs& args) {
  return matmul_transposed_workspace_bytes(args);
}

template <class Args, ProductFn<Args> kRun>
constexpr KernelEntry<Args> gemv_entry(const char* name, UsableFn usable) {
  return {.name = name,
          .usable = usable,
          .supports = gemv_supports,
          .prefers = gemv_preferred,
          .workspace_bytes = product_workspace_bytes,
          .run = product<Args, kRun>};
}

template <class Args, ProductFn<Args> kRun>
constexpr KernelEntry<Args> gemm_entry(const char* name, UsableFn usable) {
  return {.name = name,
          .usable = usable,
          .workspace_bytes = product_workspace_bytes,
          .run = product<Args, kRun>,
          .dense_is_faster = true};
}
#endif

#if defined(QN_CPU_AMX)
template <class Args, ProductFn<Args> kRun>
constexpr KernelEntry<Args> amx_entry(const char* name) {
  return {.name = name,
          .usable = amx_usable,
          .supports = bf16_supports,
          .prefers = amx_preferred,
          .workspace_bytes = gemm_amx_workspace_bytes,
          .run = product<Args, kRun>};
}
#endif

// ---- products of groups: the kernel of each group is chosen by its own rows ----

template <class Grouped>
using ProductArgs = std::conditional_t<std::is_same_v<Grouped, GroupedMatmulArgs>, MatmulArgs,
                                       MatmulTransposedArgs>;

template <class Grouped, ChooseProductFn<ProductArgs<Grouped>> kChoose>
void grouped(const Grouped& args, Workspace workspace, Stream) {
  const DefaultFloatScope float_scope;
  run_grouped(args, workspace, kChoose);
}

template <class Grouped, ChooseProductFn<ProductArgs<Grouped>> kChoose>
int64_t grouped_bytes(const Grouped& args) {
  return grouped_workspace_bytes(args, kChoose);
}

template <class Grouped, ChooseProductFn<ProductArgs<Grouped>> kChoose>
constexpr KernelEntry<Grouped> grouped_entry(const char* name,
                                             bool (*usable)(Device, std::string*)) {
  return {.name = name,
          .usable = usable,
          .workspace_bytes = grouped_bytes<Grouped, kChoose>,
          .run = grouped<Grouped, kChoose>,
          .dense_is_faster = true};
}

template <class Args, void (*kRun)(const Args&, Workspace)>
ProductKernel<Args> always(const Args&) {
  return {.run = kRun};
}

#if defined(QN_CPU_X86)
template <class Args, ProductFn<Args> kGemv>
ProductKernel<Args> gemv_only(const Args&) {
  return {kGemv, product_workspace_bytes, product_workspace_bytes};
}

template <class Args, ProductFn<Args> kGemv, ProductFn<Args> kGemm>
ProductKernel<Args> gemv_or_gemm(const Args& args) {
  std::string why_not;
  const bool is_few = gemv_preferred(args) && gemv_supports(args, &why_not);
  return {is_few ? kGemv : kGemm, product_workspace_bytes, product_workspace_bytes};
}

bool gemv_supports(const GroupedMatmulArgs& args, std::string* why_not) {
  return rows_hold_whole_blocks(args.weights.first, why_not);
}
bool gemv_supports(const GroupedMatmulTransposedArgs& args, std::string* why_not) {
  return rows_hold_whole_blocks(args.weights.first, why_not);
}

/// Where every group has few rows; else some are better multiplied otherwise.
template <class Grouped>
bool grouped_gemv_preferred(const Grouped& args) {
  return largest_group(args.ends) <= kGemvMaxRows;
}

template <class Grouped, ProductFn<ProductArgs<Grouped>> kGemv>
constexpr KernelEntry<Grouped> grouped_gemv_entry(const char* name, UsableFn usable) {
  KernelEntry<Grouped> entry =
      grouped_entry<Grouped, gemv_only<ProductArgs<Grouped>, kGemv>>(name, usable);
  entry.supports = gemv_supports;
  entry.prefers = grouped_gemv_preferred;
  entry.dense_is_faster = false;
  return entry;
}
#endif

#if defined(QN_CPU_AMX)
template <class Args, ProductFn<Args> kGemv, ProductFn<Args> kAmx>
ProductKernel<Args> gemv_or_amx(const Args& args) {
  if (amx_preferred(args)) return {kAmx, gemm_amx_workspace_bytes, gemm_amx_least_workspace_bytes};
  return {kGemv, product_workspace_bytes, product_workspace_bytes};
}

bool bf16_supports(const GroupedMatmulArgs& args, std::string* why_not) {
  return is_bfloat16(args.x.dtype, why_not);
}
bool bf16_supports(const GroupedMatmulTransposedArgs& args, std::string* why_not) {
  return is_bfloat16(args.dy.dtype, why_not);
}

template <class Grouped>
bool grouped_amx_preferred(const Grouped& args) {
  return amx_preferred(args.weights.first, largest_group(args.ends));
}

template <class Grouped, ChooseProductFn<ProductArgs<Grouped>> kChoose>
constexpr KernelEntry<Grouped> grouped_amx_entry(const char* name) {
  KernelEntry<Grouped> entry = grouped_entry<Grouped, kChoose>(name, amx_usable);
  entry.supports = bf16_supports;
  entry.prefers = grouped_amx_preferred;
  entry.dense_is_faster = false;
  return entry;
}
#endif

constexpr KernelEntry<QuantizeArgs> kQuantize[] = {
#if defined(QN_CPU_X86)
    {.name = "avx512",
     .usable = avx512_usable,
     .workspace_bytes = quantize_workspace_bytes,
     .run = quantize<encode_blocks_avx512>},
    {.name = "avx2",
     .usable = avx2_usable,
     .workspace_bytes = quantize_workspace_bytes,
     .run = quantize<encode_blocks_avx2>},
#endif
    {.name = "scalar",
     .usable = always_usable,
     .workspace_bytes = quantize_workspace_bytes,
     .run = quantize<encode_blocks_scalar>},
};

constexpr KernelEntry<DequantizeArgs> kDequantize[] = {
#if defined(QN_CPU_X86)
    {.name = "avx512", .usable = avx512_usable, .run = dequantize<decode_blocks_avx512>},
    {.name = "avx2", .usable = avx2_usable, .run = dequantize<decode_blocks_avx2>},
#endif
    {.name = "scalar", .usable = always_usable, .run = dequantize<decode_blocks_scalar>},
};

constexpr KernelEntry<MatmulArgs> kMatmul[] = {
#if defined(QN_CPU_AMX)
    amx_entry<MatmulArgs, gemm_amx>("gemm_amx"),
#endif
#if defined(QN_CPU_X86)
    gemv_entry<MatmulArgs, gemv_avx512>("gemv_avx512", avx512_usable),
    gemm_entry<MatmulArgs, gemm_avx512>("gemm_avx512", avx512_usable),
    gemv_entry<MatmulArgs, gemv_avx2>("gemv_avx2", avx2_usable),
    gemm_entry<MatmulArgs, gemm_avx2>("gemm_avx2", avx2_usable),
#endif
    {.name = "scalar",
     .usable = always_usable,
     .run = product<MatmulArgs, matmul_scalar>,
     .dense_is_faster = true},
};

constexpr KernelEntry<MatmulTransposedArgs> kMatmulTransposed[] = {
#if defined(QN_CPU_AMX)
    amx_entry<MatmulTransposedArgs, gemm_transposed_amx>("gemm_amx"),
#endif
#if defined(QN_CPU_X86)
    gemv_entry<MatmulTransposedArgs, gemv_transposed_avx512>("gemv_avx512", avx512_usable),
    gemm_entry<MatmulTransposedArgs, gemm_transposed_avx512>("gemm_avx512", avx512_usable),
    gemv_entry<MatmulTransposedArgs, gemv_transposed_avx2>("gemv_avx2", avx2_usable),
    gemm_entry<MatmulTransposedArgs, gemm_transposed_avx2>("gemm_avx2", avx2_usable),
#endif
    {.name = "scalar",
     .usable = always_usable,
     .run = product<MatmulTransposedArgs, matmul_transposed_scalar>,
     .dense_is_faster = true},
};

constexpr KernelEntry<GroupedMatmulArgs> kGroupedMatmul[] = {
#if defined(QN_CPU_AMX)
    grouped_amx_entry<GroupedMatmulArgs, gemv_or_amx<MatmulArgs, gemv_avx512, gemm_amx>>(
        "gemm_amx"),
#endif
#if defined(QN_CPU_X86)
    grouped_gemv_entry<GroupedMatmulArgs, gemv_avx512>("gemv_avx512", avx512_usable),
    grouped_entry<GroupedMatmulArgs, gemv_or_gemm<MatmulArgs, gemv_avx512, gemm_avx512>>(
        "gemm_avx512", avx512_usable),
    grouped_gemv_entry<GroupedMatmulArgs, gemv_avx2>("gemv_avx2", avx2_usable),
    grouped_entry<GroupedMatmulArgs, gemv_or_gemm<MatmulArgs, gemv_avx2, gemm_avx2>>("gemm_avx2",
                                                                                     avx2_usable),
#endif
    grouped_entry<GroupedMatmulArgs, always<MatmulArgs, matmul_scalar>>("scalar", always_usable),
};

constexpr KernelEntry<GroupedMatmulTransposedArgs> kGroupedMatmulTransposed[] = {
#if defined(QN_CPU_AMX)
    grouped_amx_entry<
        GroupedMatmulTransposedArgs,
        gemv_or_amx<MatmulTransposedArgs, gemv_transposed_avx512, gemm_transposed_amx>>("gemm_amx"),
#endif
#if defined(QN_CPU_X86)
    grouped_gemv_entry<GroupedMatmulTransposedArgs, gemv_transposed_avx512>("gemv_avx512",
                                                                            avx512_usable),
    grouped_entry<
        GroupedMatmulTransposedArgs,
        gemv_or_gemm<MatmulTransposedArgs, gemv_transposed_avx512, gemm_transposed_avx512>>(
        "gemm_avx512", avx512_usable),
    grouped_gemv_entry<GroupedMatmulTransposedArgs, gemv_transposed_avx2>("gemv_avx2", avx2_usable),
    grouped_entry<GroupedMatmulTransposedArgs,
                  gemv_or_gemm<MatmulTransposedArgs, gemv_transposed_avx2, gemm_transposed_avx2>>(
        "gemm_avx2", avx2_usable),
#endif
    grouped_entry<GroupedMatmulTransposedArgs,
                  always<MatmulTransposedArgs, matmul_transposed_scalar>>("scalar", always_usable),
};

constexpr KernelEntry<OptimizerStepArgs> kOptimizerStep[] = {
#if defined(QN_CPU_X86)
    {.name = "avx512",
     .usable = avx512_usable,
     .workspace_bytes = optimizer_step_workspace_bytes,
     .run = step<step_elements_avx512>},
    {.name = "avx2",
     .usable = avx2_usable,
     .workspace_bytes = optimizer_step_workspace_bytes,
     .run = step<step_elements_avx2>},
#endif
    {.name = "scalar",
     .usable = always_usable,
     .workspace_bytes = optimizer_step_workspace_bytes,
     .run = step<step_elements_scalar>},
};

constexpr KernelEntry<GradientNormArgs> kGradientNorm[] = {
    {.name = "scalar",
     .usable = always_usable,
     .workspace_bytes = gradient_norm_workspace_bytes,
     .run = norm},
};

constexpr KernelEntry<LoraProjectArgs> kLoraProject[] = {
    {.name = "scalar",
     .usable = always_usable,
     .workspace_bytes = lora_workspace_bytes,
     .run = product<LoraProjectArgs, lora_project_scalar>,
     .dense_is_faster = true},
};

constexpr KernelEntry<LoraUpdateArgs> kLoraUpdate[] = {
    {.name = "scalar",
     .usable = always_usable,
     .workspace_bytes = lora_workspace_bytes,
     .run = product<LoraUpdateArgs, lora_update_scalar>,
     .dense_is_faster = true},
};

constexpr KernelEntry<LoraGradientArgs> kLoraGradient[] = {
    {.name = "scalar",
     .usable = always_usable,
     .run = product<LoraGradientArgs, lora_gradient_scalar>,
     .dense_is_faster = true},
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
      .optimizer_step = kOptimizerStep,
      .gradient_norm = kGradientNorm,
      .lora_project = kLoraProject,
      .lora_update = kLoraUpdate,
      .lora_gradient = kLoraGradient,
      .grouped_matmul = kGroupedMatmul,
      .grouped_matmul_transposed = kGroupedMatmulTransposed,
      .list_devices = list_devices,
      .unavailable_reason = [] { return std::string(); },
  };
  return kBackend;
}

}  // namespace qlora_native::cpu
