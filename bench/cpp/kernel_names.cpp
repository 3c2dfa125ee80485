#include "kernel_names.h"

#include <algorithm>
#include <stdexcept>

#include "options.h"

namespace bench {

namespace qn = qlora_native;

std::vector<std::string> kernels_to_measure(qn::Op op, qn::DeviceType device,
                                            const std::string& asked_for) {
  if (asked_for.empty()) return {""};
  std::vector<std::string> names;
  for (const qn::KernelInfo& kernel : qn::list_kernels()) {
    if (kernel.op != op || kernel.device != device) continue;
    if (asked_for == kAllKernels ? kernel.usable : asked_for == kernel.name) {
      names.push_back(kernel.name);
    }
  }
  return names;
}

void refuse_kernel(std::span<const qn::Op> ops, qn::DeviceType device,
                   const std::string& asked_for) {
  std::string message = "--kernel: '" + asked_for + "' is none of all";
  std::vector<std::string> names;
  for (const qn::KernelInfo& kernel : qn::list_kernels()) {
    const bool is_here = kernel.device == device &&
                         std::find(ops.begin(), ops.end(), kernel.op) != ops.end() &&
                         std::find(names.begin(), names.end(), kernel.name) == names.end();
    if (!is_here) continue;
    names.push_back(kernel.name);
    message += ", " + kernel.name;
  }
  throw std::invalid_argument(message);
}

void unforce_kernels(qn::DeviceType device) {
  for (const qn::Op op : qn::kAllOps) qn::force_kernel(op, device, "");
}

}  // namespace bench
