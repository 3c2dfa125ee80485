// The queue on which a CUDA operation is ordered. Ignored by operations on the CPU.
#pragma once

#include <cstddef>

namespace qlora_native {

/// A borrowed CUDA stream handle. It cannot be made from 0 or nullptr by accident: the legacy
/// default stream, like the CPU's absent one, has to be asked for by name.
class Stream {
 public:
  Stream() = delete;
  Stream(int) = delete;
  Stream(std::nullptr_t) = delete;

  /// `handle` is a cudaStream_t (a null one is the legacy default stream, as torch's often is).
  static constexpr Stream from_handle(void* handle) { return Stream(handle, Tag{}); }
  static constexpr Stream legacy_default() { return from_handle(nullptr); }
  /// For operations on the CPU, which complete before they return.
  static constexpr Stream none() { return from_handle(nullptr); }

  constexpr void* handle() const { return handle_; }

 private:
  struct Tag {};
  constexpr Stream(void* handle, Tag) : handle_(handle) {}
  void* handle_;
};

}  // namespace qlora_native
