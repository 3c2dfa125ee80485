// Choice of the kernel for a call, and the call.
#pragma once

#include <cstring>
#include <string>

#include "backend.h"
#include "qlora_native/error.h"

namespace qlora_native {

/// Notes which kernel ran (kernels.h, last_kernel). In registry.cpp.
void record_last_kernel(Op op, const char* kernel_name);
/// The forced kernel, or null. In registry.cpp.
const char* forced_kernel_name(Op op, DeviceType device);

/// The first kernel that runs on the device, is right for `args` and is the measured choice for
/// them; or the forced one. Throws Unsupported, naming every kernel and why it declined.
template <class Args>
const KernelEntry<Args>& select_kernel(const Args& args) {
  using Traits = OpTraits<Args>;
  const Device device = Traits::device(args);
  const auto table = backend_for(device.type).*Traits::kTable;
  const char* const forced = forced_kernel_name(Traits::kOp, device.type);
  std::string report;
  for (const KernelEntry<Args>& entry : table) {
    std::string why_not;
    if (forced && std::strcmp(forced, entry.name) != 0) continue;
    if (!entry.usable(device, &why_not)) {
    } else if (entry.supports && !entry.supports(args, &why_not)) {
    } else if (!forced && entry.prefers && !entry.prefers(args)) {
      why_not = "another kernel is preferred";
    } else {
      return entry;
    }
    report += std::string("\n  ") + entry.name + ": " + why_not;
  }
  if (table.empty()) report = " " + backend_for(device.type).unavailable_reason();
  throw Unsupported(std::string(name(Traits::kOp)) + ": no kernel on " + to_string(device) +
                    (forced ? " (" + std::string(forced) + " is forced)" : "") +
                    " takes this call:" + report);
}

template <class Args>
int64_t kernel_workspace_bytes(const Args& args) {
  const KernelEntry<Args>& entry = select_kernel(args);
  return entry.workspace_bytes ? entry.workspace_bytes(args) : 0;
}

template <class Args>
void run_kernel(const Args& args, Workspace workspace, Stream stream) {
  const KernelEntry<Args>& entry = select_kernel(args);
  const int64_t needed = entry.workspace_bytes ? entry.workspace_bytes(args) : 0;
  if (workspace.size_bytes < needed || (needed > 0 && workspace.data == nullptr)) {
    throw InvalidArgument(std::string(name(OpTraits<Args>::kOp)) + ": the workspace has " +
                          std::to_string(workspace.size_bytes) + " bytes, " + entry.name +
                          " needs " + std::to_string(needed));
  }
  entry.run(args, workspace, stream);
  record_last_kernel(OpTraits<Args>::kOp, entry.name);
}

}  // namespace qlora_native
