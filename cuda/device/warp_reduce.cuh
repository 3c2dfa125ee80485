// Reductions over the lanes of a warp. All 32 lanes must call them.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

/// The sum over the warp, in every lane, always added in the same order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int stride = kWarpSize / 2; stride > 0; stride /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, stride);
  }
  return value;
}

/// The maximum over each group of `width` consecutive lanes (a power of two), in every lane.
__device__ __forceinline__ uint32_t group_max(uint32_t value, int width) {
#pragma unroll
  for (int stride = 1; stride < kWarpSize; stride *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, value, stride);
    if (stride < width) value = value > other ? value : other;
  }
  return value;
}

/// The sum over the warp in lane 0 as a pairwise tree: lane i adds lane i + stride, strides 16, 8,
/// 4, 2, 1.
template <class T>
__device__ __forceinline__ T warp_tree_sum(T value) {
#pragma unroll
  for (int stride = kWarpSize / 2; stride > 0; stride /= 2) {
    value += __shfl_down_sync(kAllLanes, value, stride);
  }
  return value;
}

}  // namespace qlora_native::cuda
