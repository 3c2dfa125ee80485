// A warp as one: what all of its lanes have alike, and what one of them does for all.
#pragma once

#include <cstdint>

#include "device/warp_reduce.cuh"

namespace qlora_native::cuda {

/// True in one lane of the warp, all of whose lanes call it.
__device__ __forceinline__ bool elect_lane() {
  uint32_t is_elected;
  asm volatile(
      "{.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;}"
      : "=r"(is_elected));
  return is_elected != 0;
}

/// A value that is the same in all lanes, and that the compiler then knows to be.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(kAllLanes, value, 0); }

}  // namespace qlora_native::cuda
