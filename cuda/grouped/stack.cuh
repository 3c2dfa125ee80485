// The matrices of a grouped product as kernels take them.
#pragma once

#include <cstdint>

#include "device/decode.cuh"
#include "grouped/group_tiles.cuh"
#include "host/kernel_args.h"
#include "qlora_native/grouped_matmul.h"

namespace qlora_native::cuda {

/// A kernel parameter.
struct StackOnDevice {
  const uint8_t* packed;
  BlockScales scales;  ///< of matrix 0
  int64_t packed_stride;
  int64_t absmax_stride;
  int64_t absmax2_stride;
  int64_t offset_stride;

  __device__ __forceinline__ const uint8_t* packed_of(int64_t group) const {
    return packed + group * packed_stride;
  }

  template <bool kDoubleQuant>
  __device__ __forceinline__ BlockScales scales_of(int64_t group) const {
    BlockScales of = scales;
    if constexpr (kDoubleQuant) {
      of.codes += group * absmax_stride;
      of.absmax2 += group * absmax2_stride;
      // An array without elements may come without an offset.
      if (of.offset != nullptr) of.offset += group * offset_stride;
    } else {
      of.values += group * absmax_stride;
    }
    return of;
  }
};

inline StackOnDevice stack_on_device(const QuantizedStackView& stack) {
  return {stack.first.packed,  block_scales(stack.first), stack.packed_stride,
          stack.absmax_stride, stack.absmax2_stride,      stack.offset_stride};
}

inline GroupEndsOnDevice ends_on_device(const GroupEnds& ends, int64_t rows) {
  return {ends.data, ends.type == IndexType::kInt64, ends.size, rows};
}

}  // namespace qlora_native::cuda
