// Python's numbers as the core's arguments: addresses, device codes, streams.
#pragma once

#include <cstdint>

#include "qlora_native/device.h"
#include "qlora_native/matmul.h"
#include "qlora_native/quantized.h"
#include "qlora_native/stream.h"
#include "qlora_native/views.h"

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

/// Python's device code: -1 is the CPU, i >= 0 is CUDA device i.
inline qlora_native::Device device_of(int device) {
  return device < 0 ? qlora_native::Device::cpu() : qlora_native::Device::cuda(device);
}

inline qlora_native::Workspace workspace_of(uintptr_t data, int64_t size_bytes) {
  return {pointer(data), size_bytes};
}

inline qlora_native::Stream stream_of(uintptr_t handle) {
  return qlora_native::Stream::from_handle(pointer(handle));
}

inline qlora_native::QuantizedView read_only(const qlora_native::MutableQuantizedView& view) {
  return {
      .packed = view.packed,
      .absmax = {view.absmax.values, view.absmax.codes, view.absmax.absmax2, view.absmax.offset},
      .rows = view.rows,
      .cols = view.cols,
      .block_size = view.block_size,
      .codebook = view.codebook,
      .device = view.device};
}

/// What a caller with a dense GEMM at hand needs to know before a matmul: -1 when that GEMM over
/// the dequantized weight is faster, else the workspace bytes of our kernel.
inline constexpr int64_t kPreferDense = -1;

inline int64_t plan_code(const qlora_native::MatmulPlan& plan) {
  return plan.prefers_dense ? kPreferDense : plan.workspace_bytes;
}
