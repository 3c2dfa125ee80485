// Device -> Backend, the list of kernels, and the forced and last kernels.
#include <atomic>
#include <string>
#include <vector>

#include "backend.h"
#include "dispatch.h"
#include "qlora_native/error.h"
#include "qlora_native/kernels.h"
#include "validate.h"

namespace qlora_native {
namespace {

constexpr size_t kNumOps = std::size(kAllOps);
constexpr DeviceType kDeviceTypes[] = {DeviceType::kCpu, DeviceType::kCuda};

/// Names from the kernel tables, which live as long as the program; null for none. Process-wide,
/// because a framework may run the two halves of one training step on different threads.
std::atomic<const char*> g_forced[kNumOps][std::size(kDeviceTypes)];
std::atomic<const char*> g_last[kNumOps];

size_t index_of(Op op) {
  const auto index = static_cast<size_t>(op);
  if (index >= kNumOps) throw InvalidArgument("no operation " + std::to_string(index));
  return index;
}

std::atomic<const char*>& forced_slot(Op op, DeviceType device) {
  const auto device_index = static_cast<size_t>(device);
  if (device_index >= std::size(kDeviceTypes)) {
    throw InvalidArgument("no device type " + std::to_string(device_index));
  }
  return g_forced[index_of(op)][device_index];
}

template <class Args>
void append_kernels(const Backend& backend, std::vector<KernelInfo>* kernels) {
  for (const KernelEntry<Args>& entry : backend.*OpTraits<Args>::kTable) {
    KernelInfo info{OpTraits<Args>::kOp, backend.type, entry.name, false, ""};
    info.usable = entry.usable({backend.type, 0}, &info.why_not);
    kernels->push_back(std::move(info));
  }
}

template <class Args>
std::vector<const char*> names_of(KernelTable<Args> table) {
  std::vector<const char*> names;
  for (const KernelEntry<Args>& entry : table) names.push_back(entry.name);
  return names;
}

template <class Args>
std::string validated_selection(const Args& args) {
  validate(args);
  return select_kernel(args).name;
}

}  // namespace

const Backend& backend_for(DeviceType type) {
  return type == DeviceType::kCuda ? cuda::backend() : cpu::backend();
}

const PagedMemoryTable& paged_memory_for(DeviceType type) {
  return type == DeviceType::kCuda ? cuda::paged_memory() : cpu::paged_memory();
}

const char* name(Op op) {
  switch (op) {
    case Op::kQuantize4bit:
      return "quantize_4bit";
    case Op::kDequantize4bit:
      return "dequantize_4bit";
    case Op::kMatmul4bit:
      return "matmul_4bit";
    case Op::kMatmul4bitTransposed:
      return "matmul_4bit_transposed";
    case Op::kOptimizerStep:
      return "optimizer_step";
    case Op::kGradientNorm:
      return "gradient_norm";
    case Op::kLoraProject:
      return "lora_project";
    case Op::kLoraUpdate:
      return "lora_update";
    case Op::kLoraGradient:
      return "lora_gradient";
    case Op::kGroupedMatmul4bit:
      return "grouped_matmul_4bit";
    case Op::kGroupedMatmul4bitTransposed:
      return "grouped_matmul_4bit_transposed";
  }
  return "unknown";
}

std::vector<KernelInfo> list_kernels() {
  std::vector<KernelInfo> kernels;
  for (const DeviceType type : kDeviceTypes) {
    const Backend& backend = backend_for(type);
    append_kernels<QuantizeArgs>(backend, &kernels);
    append_kernels<DequantizeArgs>(backend, &kernels);
    append_kernels<MatmulArgs>(backend, &kernels);
    append_kernels<MatmulTransposedArgs>(backend, &kernels);
    append_kernels<OptimizerStepArgs>(backend, &kernels);
    append_kernels<GradientNormArgs>(backend, &kernels);
    append_kernels<LoraProjectArgs>(backend, &kernels);
    append_kernels<LoraUpdateArgs>(backend, &kernels);
    append_kernels<LoraGradientArgs>(backend, &kernels);
    append_kernels<GroupedMatmulArgs>(backend, &kernels);
    append_kernels<GroupedMatmulTransposedArgs>(backend, &kernels);
  }
  return kernels;
}

void force_kernel(Op op, DeviceType device, const std::string& kernel_name) {
  std::atomic<const char*>& slot = forced_slot(op, device);
  if (kernel_name.empty()) {
    slot = nullptr;
    return;
  }
  const Backend& backend = backend_for(device);
  std::vector<const char*> names;
  switch (op) {
    case Op::kQuantize4bit:
      names = names_of(backend.quantize);
      break;
    case Op::kDequantize4bit:
      names = names_of(backend.dequantize);
      break;
    case Op::kMatmul4bit:
      names = names_of(backend.matmul);
      break;
    case Op::kMatmul4bitTransposed:
      names = names_of(backend.matmul_transposed);
      break;
    case Op::kOptimizerStep:
      names = names_of(backend.optimizer_step);
      break;
    case Op::kGradientNorm:
      names = names_of(backend.gradient_norm);
      break;
    case Op::kLoraProject:
      names = names_of(backend.lora_project);
      break;
    case Op::kLoraUpdate:
      names = names_of(backend.lora_update);
      break;
    case Op::kLoraGradient:
      names = names_of(backend.lora_gradient);
      break;
    case Op::kGroupedMatmul4bit:
      names = names_of(backend.grouped_matmul);
      break;
    case Op::kGroupedMatmul4bitTransposed:
      names = names_of(backend.grouped_matmul_transposed);
      break;
  }
  std::string known;
  for (const char* candidate : names) {
    if (kernel_name == candidate) {
      slot = candidate;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(candidate);
  }
  throw InvalidArgument(std::string(name(op)) + ": no kernel named '" + kernel_name + "' on " +
                        name(device) + "; there are: " + (known.empty() ? "none" : known));
}

const char* forced_kernel_name(Op op, DeviceType device) { return forced_slot(op, device); }

std::string forced_kernel(Op op, DeviceType device) {
  const char* kernel_name = forced_kernel_name(op, device);
  return kernel_name ? kernel_name : "";
}

void record_last_kernel(Op op, const char* kernel_name) {
  // A name orders nothing else in memory: no fence in every call.
  g_last[index_of(op)].store(kernel_name, std::memory_order_relaxed);
}

std::string last_kernel(Op op) {
  const char* kernel_name = g_last[index_of(op)];
  return kernel_name ? kernel_name : "";
}

std::string selected_kernel(const QuantizeArgs& args) { return validated_selection(args); }
std::string selected_kernel(const DequantizeArgs& args) { return validated_selection(args); }
std::string selected_kernel(const MatmulArgs& args) { return validated_selection(args); }
std::string selected_kernel(const MatmulTransposedArgs& args) { return validated_selection(args); }
std::string selected_kernel(const OptimizerStepArgs& args) { return validated_selection(args); }
std::string selected_kernel(const GradientNormArgs& args) { return validated_selection(args); }
std::string selected_kernel(const LoraProjectArgs& args) { return validated_selection(args); }
std::string selected_kernel(const LoraUpdateArgs& args) { return validated_selection(args); }
std::string selected_kernel(const LoraGradientArgs& args) { return validated_selection(args); }
std::string selected_kernel(const GroupedMatmulArgs& args) { return validated_selection(args); }
std::string selected_kernel(const GroupedMatmulTransposedArgs& args) {
  return validated_selection(args);
}

}  // namespace qlora_native
