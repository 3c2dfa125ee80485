// Dropout of what lies in registers.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// Zeroes the elements of eight 16-bit ones whose bit in `kept` is not set.
__device__ __forceinline__ void drop(uint4& elems, uint32_t kept) {
  uint32_t* const words[4] = {&elems.x, &elems.y, &elems.z, &elems.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = (kept >> (2 * i) & 1u) * 0xffffu;
    const uint32_t high = (kept >> (2 * i + 1) & 1u) * 0xffff0000u;
    *words[i] &= low | high;
  }
}

}  // namespace qlora_native::cuda
