// Choice of the kernel for a call, and the call.
#pragma once

#include <cstring>
#include <sstream>
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
  std::ostringstream report;
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
    report << "\n  " << entry.name << ": " << why_not;
  }
  if (table.empty()) report << ' ' << backend_for(device.type).unavailable_reason();
  std::ostringstream message;
  message << name(Traits::kOp) << ": no kernel on " << to_string(device);
  if (forced) message << " (" << forced << " is forced)";
  message << " takes this call:" << report.str();
  throw Unsupported(message.str());
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
    std::ostringstream message;
    message << name(OpTraits<Args>::kOp) << ": the workspace has " << workspace.size_bytes
            << " bytes, " << entry.name << " needs " << needed;
    throw InvalidArgument(message.str());
  }
  entry.run(args, workspace, stream);
  record_last_kernel(OpTraits<Args>::kOp, entry.name);
}

}  // namespace qlora_native
