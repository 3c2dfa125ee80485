// Device -> Backend, the list of kernels, and the calling thread's forced and last kernels.
#include <array>
#include <string>

#include "backend.h"
#include "dispatch.h"
#include "qlora_native/error.h"
#include "qlora_native/kernels.h"
#include "validate.h"

namespace qlora_native {
namespace {

constexpr size_t kNumOps = std::size(kAllOps);
constexpr DeviceType kDeviceTypes[] = {DeviceType::kCpu, DeviceType::kCuda};

struct ThreadState {
  std::array<std::array<std::string, std::size(kDeviceTypes)>, kNumOps> forced;
  std::array<const char*, kNumOps> last{};
};

ThreadState& thread_state() {
  thread_local ThreadState state;
  return state;
}

std::string& forced_slot(Op op, DeviceType device) {
  const auto op_index = static_cast<size_t>(op);
  const auto device_index = static_cast<size_t>(device);
  if (op_index >= kNumOps || device_index >= std::size(kDeviceTypes)) {
    throw InvalidArgument("no operation " + std::to_string(op_index) + " on device type " +
                          std::to_string(device_index));
  }
  return thread_state().forced[op_index][device_index];
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
std::string validated_selection(const Args& args) {
  validate(args);
  return select_kernel(args).name;
}

}  // namespace

const Backend& backend_for(DeviceType type) {
  return type == DeviceType::kCuda ? cuda::backend() : cpu::backend();
}

const char* name(Op op) {
  switch (op) {
    case Op::kQuantize4bit: return "quantize_4bit";
    case Op::kDequantize4bit: return "dequantize_4bit";
    case Op::kMatmul4bit: return "matmul_4bit";
    case Op::kMatmul4bitTransposed: return "matmul_4bit_transposed";
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
  }
  return kernels;
}

void force_kernel(Op op, DeviceType device, const std::string& kernel_name) {
  std::string& slot = forced_slot(op, device);
  std::string known;
  bool found = kernel_name.empty();
  for (const KernelInfo& info : list_kernels()) {
    if (info.op != op || info.device != device) continue;
    found = found || info.name == kernel_name;
    known += (known.empty() ? "" : ", ") + info.name;
  }
  if (!found) {
    throw InvalidArgument(std::string(name(op)) + ": no kernel named '" + kernel_name + "' on " +
                          name(device) + "; there are: " + (known.empty() ? "none" : known));
  }
  slot = kernel_name;
}

const std::string& forced_kernel_ref(Op op, DeviceType device) { return forced_slot(op, device); }

std::string forced_kernel(Op op, DeviceType device) { return forced_slot(op, device); }

void record_last_kernel(Op op, const char* kernel_name) {
  thread_state().last[static_cast<size_t>(op)] = kernel_name;
}

std::string last_kernel(Op op) {
  const auto index = static_cast<size_t>(op);
  if (index >= kNumOps) throw InvalidArgument("no operation " + std::to_string(index));
  const char* kernel_name = thread_state().last[index];
  return kernel_name ? kernel_name : "";
}

std::string selected_kernel(const QuantizeArgs& args) { return validated_selection(args); }
std::string selected_kernel(const DequantizeArgs& args) { return validated_selection(args); }
std::string selected_kernel(const MatmulArgs& args) { return validated_selection(args); }
std::string selected_kernel(const MatmulTransposedArgs& args) { return validated_selection(args); }

}  // namespace qlora_native
