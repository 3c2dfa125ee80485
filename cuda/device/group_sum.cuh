// Stage 1 of the sum behind the offset of the double quantization; the order is in
// double_quantize.cu.
#pragma once

#include <cstdint>

#include "device/encode.cuh"
#include "device/warp_reduce.cuh"
#include "qlora_native/codebook.h"

namespace qlora_native::cuda {

/// Values of a group that a lane holds: slots lane, lane + 32, ..., lane + 224.
inline constexpr int kSlotsPerLane = kGroupSize / kWarpSize;

/// Where stage 1 leaves a sum and a number of finite values per group.
struct GroupSums {
  double* partials;
  int32_t* finite_counts;
};

/// By a warp. Slots without a value hold a NaN: it does not count.
__device__ __forceinline__ void sum_group(const float (&values)[kSlotsPerLane], int64_t group,
                                          const GroupSums& sums) {
  double slots[kSlotsPerLane];
  int32_t finite_count = 0;
#pragma unroll
  for (int j = 0; j < kSlotsPerLane; ++j) {
    const bool is_finite = abs_bits(values[j]) < kInfinityBits;
    slots[j] = is_finite ? static_cast<double>(values[j]) : 0.0;
    finite_count += __popc(__ballot_sync(kAllLanes, is_finite));
  }
#pragma unroll
  for (int stride = kSlotsPerLane / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int j = 0; j < stride; ++j) slots[j] += slots[j + stride];
  }
  const double sum = warp_tree_sum(slots[0]);
  if (threadIdx.x % kWarpSize == 0) {
    sums.partials[group] = sum;
    sums.finite_counts[group] = finite_count;
  }
}

}  // namespace qlora_native::cuda
