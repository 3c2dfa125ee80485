// What a device type brings: its kernels and its devices. The operations see backends only through
// this.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"
#include "paged_driver.h"
#include "qlora_native/dequantize.h"
#include "qlora_native/device.h"
#include "qlora_native/grouped_matmul.h"
#include "qlora_native/kernels.h"
#include "qlora_native/lora.h"
#include "qlora_native/matmul.h"
#include "qlora_native/optimizer.h"
#include "qlora_native/quantize.h"

namespace qlora_native {

struct Backend {
  DeviceType type;
  KernelTable<QuantizeArgs> quantize;
  KernelTable<DequantizeArgs> dequantize;
  KernelTable<MatmulArgs> matmul;
  KernelTable<MatmulTransposedArgs> matmul_transposed;
  KernelTable<OptimizerStepArgs> optimizer_step;
  KernelTable<GradientNormArgs> gradient_norm;
  KernelTable<LoraProjectArgs> lora_project;
  KernelTable<LoraUpdateArgs> lora_update;
  KernelTable<LoraGradientArgs> lora_gradient;
  KernelTable<GroupedMatmulArgs> grouped_matmul;
  KernelTable<GroupedMatmulTransposedArgs> grouped_matmul_transposed;
  /// The usable devices of this type; empty when there is none. Does not throw.
  std::vector<DeviceInfo> (*list_devices)();
  /// Why `list_devices` is empty, or "".
  std::string (*unavailable_reason)();
};

/// Defined in registry.cpp, the one file that names the backends.
const Backend& backend_for(DeviceType type);
const PagedMemoryTable& paged_memory_for(DeviceType type);

namespace cpu {
const Backend& backend();
const PagedMemoryTable& paged_memory();
}  // namespace cpu
namespace cuda {
/// From cuda/backend.cpp and cuda/memory.cpp, or, in a build without CUDA, from no_cuda/backend.cpp.
const Backend& backend();
const PagedMemoryTable& paged_memory();
}  // namespace cuda

/// Picks the table of an operation from a backend by the type of its arguments.
template <class Args>
struct OpTraits;
template <>
struct OpTraits<QuantizeArgs> {
  static constexpr Op kOp = Op::kQuantize4bit;
  static constexpr auto kTable = &Backend::quantize;
  static Device device(const QuantizeArgs& args) { return args.output.device; }
};
template <>
struct OpTraits<DequantizeArgs> {
  static constexpr Op kOp = Op::kDequantize4bit;
  static constexpr auto kTable = &Backend::dequantize;
  static Device device(const DequantizeArgs& args) { return args.weight.device; }
};
template <>
struct OpTraits<MatmulArgs> {
  static constexpr Op kOp = Op::kMatmul4bit;
  static constexpr auto kTable = &Backend::matmul;
  static Device device(const MatmulArgs& args) { return args.weight.device; }
};
template <>
struct OpTraits<MatmulTransposedArgs> {
  static constexpr Op kOp = Op::kMatmul4bitTransposed;
  static constexpr auto kTable = &Backend::matmul_transposed;
  static Device device(const MatmulTransposedArgs& args) { return args.weight.device; }
};
template <>
struct OpTraits<OptimizerStepArgs> {
  static constexpr Op kOp = Op::kOptimizerStep;
  static constexpr auto kTable = &Backend::optimizer_step;
  static Device device(const OptimizerStepArgs& args) { return args.device; }
};
template <>
struct OpTraits<GradientNormArgs> {
  static constexpr Op kOp = Op::kGradientNorm;
  static constexpr auto kTable = &Backend::gradient_norm;
  static Device device(const GradientNormArgs& args) { return args.device; }
};
template <>
struct OpTraits<LoraProjectArgs> {
  static constexpr Op kOp = Op::kLoraProject;
  static constexpr auto kTable = &Backend::lora_project;
  static Device device(const LoraProjectArgs& args) { return args.t.device; }
};
template <>
struct OpTraits<LoraUpdateArgs> {
  static constexpr Op kOp = Op::kLoraUpdate;
  static constexpr auto kTable = &Backend::lora_update;
  static Device device(const LoraUpdateArgs& args) { return args.y.device; }
};
template <>
struct OpTraits<LoraGradientArgs> {
  static constexpr Op kOp = Op::kLoraGradient;
  static constexpr auto kTable = &Backend::lora_gradient;
  static Device device(const LoraGradientArgs& args) { return args.grad.device; }
};
template <>
struct OpTraits<GroupedMatmulArgs> {
  static constexpr Op kOp = Op::kGroupedMatmul4bit;
  static constexpr auto kTable = &Backend::grouped_matmul;
  static Device device(const GroupedMatmulArgs& args) { return args.weights.first.device; }
};
template <>
struct OpTraits<GroupedMatmulTransposedArgs> {
  static constexpr Op kOp = Op::kGroupedMatmul4bitTransposed;
  static constexpr auto kTable = &Backend::grouped_matmul_transposed;
  static Device device(const GroupedMatmulTransposedArgs& args) {
    return args.weights.first.device;
  }
};

}  // namespace qlora_native
