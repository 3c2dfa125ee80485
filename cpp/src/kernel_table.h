// A backend's kernels for one operation, in the order in which they are tried.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "qlora_native/device.h"
#include "qlora_native/stream.h"
#include "qlora_native/views.h"

namespace qlora_native {

/// One way to run an operation whose arguments are `Args`. Predicates that decline write a phrase
/// that completes "<name>: ..." to `*why_not`.
template <class Args>
struct KernelEntry {
  const char* name;
  /// Whether this machine's hardware runs the kernel at all.
  bool (*usable)(Device device, std::string* why_not);
  /// Whether the kernel gives the right answer for these arguments. Null: always.
  bool (*supports)(const Args& args, std::string* why_not) = nullptr;
  /// Whether it is also a good choice for them, by measurement. Null: always. A forced kernel is
  /// not asked.
  bool (*prefers)(const Args& args) = nullptr;
  /// Scratch it needs. Null: none.
  int64_t (*workspace_bytes)(const Args& args) = nullptr;
  void (*run)(const Args& args, Workspace workspace, Stream stream) = nullptr;
  /// A plain product: a tuned dense library over the dequantized weight beats it (matmul.h,
  /// MatmulPlan).
  bool dense_is_faster = false;
  /// The same where it depends on the arguments. Null: never.
  bool (*dense_is_faster_for)(const Args& args) = nullptr;
};

template <class Args>
using KernelTable = std::span<const KernelEntry<Args>>;

}  // namespace qlora_native
