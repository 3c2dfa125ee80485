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

/// Whether a call with `args` on `device` may go to `entry`. If not, `*why_not` says why, or is empty
/// when another kernel is the better choice. `forced` is the name of the kernel in force, or null.
template <class Args>
bool accepts(const KernelEntry<Args>& entry, const Args& args, Device device, const char* forced,
             std::string* why_not) {
  if (!entry.usable(device, why_not)) return false;
  if (entry.supports && !entry.supports(args, why_not)) return false;
  return forced || !entry.prefers || entry.prefers(args);
}

inline bool is_left_out(const char* kernel_name, const char* forced) {
  return forced && std::strcmp(forced, kernel_name) != 0;
}

/// Throws Unsupported, naming every kernel and why it declined. Apart from the choice, which every
/// call makes and which words no report.
template <class Args>
[[noreturn, gnu::cold, gnu::noinline]] void throw_no_kernel(const Args& args, Device device,
                                                            const char* forced) {
  using Traits = OpTraits<Args>;
  const auto table = backend_for(device.type).*Traits::kTable;
  std::ostringstream message;
  message << name(Traits::kOp) << ": no kernel on " << to_string(device);
  if (forced) message << " (" << forced << " is forced)";
  message << " takes this call:";
  for (const KernelEntry<Args>& entry : table) {
    if (is_left_out(entry.name, forced)) continue;
    std::string why_not;
    accepts(entry, args, device, forced, &why_not);
    message << "\n  " << entry.name << ": "
            << (why_not.empty() ? "another kernel is preferred" : why_not);
  }
  if (table.empty()) message << ' ' << backend_for(device.type).unavailable_reason();
  throw Unsupported(message.str());
}

/// The first kernel that runs on the device, is right for `args` and is the measured choice for
/// them; or the forced one. Null when there is none. That a dense library would be faster does not
/// matter: who calls may have none.
template <class Args>
const KernelEntry<Args>* find_kernel(KernelTable<Args> table, const Args& args, Device device,
                                     const char* forced) {
  std::string why_not;
  for (const KernelEntry<Args>& entry : table) {
    if (is_left_out(entry.name, forced)) continue;
    if (accepts(entry, args, device, forced, &why_not)) return &entry;
  }
  return nullptr;
}

/// The same from the backend's table. Throws Unsupported, naming every kernel and why it declined.
template <class Args>
const KernelEntry<Args>& select_kernel(const Args& args) {
  using Traits = OpTraits<Args>;
  const Device device = Traits::device(args);
  const char* const forced = forced_kernel_name(Traits::kOp, device.type);
  const KernelTable<Args> table = backend_for(device.type).*Traits::kTable;
  const KernelEntry<Args>* const entry = find_kernel(table, args, device, forced);
  if (entry == nullptr) throw_no_kernel(args, device, forced);
  return *entry;
}

template <class Args>
int64_t kernel_workspace_bytes(const Args& args) {
  const KernelEntry<Args>& entry = select_kernel(args);
  return entry.workspace_bytes ? entry.workspace_bytes(args) : 0;
}

/// Whether the kernel of a product loses against a dense one, unless forced, and its workspace.
template <class Args>
MatmulPlan plan_with(const KernelEntry<Args>& entry, const Args& args, bool is_forced) {
  const bool dense_is_faster =
      entry.dense_is_faster || (entry.dense_is_faster_for && entry.dense_is_faster_for(args));
  return {.prefers_dense = dense_is_faster && !is_forced,
          .workspace_bytes = entry.workspace_bytes ? entry.workspace_bytes(args) : 0};
}

template <class Args>
MatmulPlan kernel_plan(const Args& args) {
  using Traits = OpTraits<Args>;
  const bool is_forced = forced_kernel_name(Traits::kOp, Traits::device(args).type) != nullptr;
  return plan_with(select_kernel(args), args, is_forced);
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
