// Over a[b], the absmax of every block, in groups of 256 blocks:
//   offset     = mean of the finite a[b]
//   absmax2[g] = max over the group of |a[b] - offset|
//   codes[b]   = nearest entry of the signed dynamic map to (a[b] - offset) * (1 / absmax2[g])
//
// The mean is summed in fp64 in the one order that every backend uses:
//   stage 1: partial[g] is the pairwise tree over the group's 256 slots (a missing or non-finite
//            value counts as 0): for stride 128, 64, ..., 1: slot[i] += slot[i + stride];
//   stage 2: lane[j], j = 0..1023, adds partial[j], partial[j + 1024], ... in this order; then the
//            same tree over the 1024 lanes;
//   offset = float(total / number of finite values), or 0 when there is none.
//
// Stage 1 and the encoding: a warp per group, 8 warps per thread block; lane l owns slots l, l +
// 32, ..., l + 224, so that strides of 32 and more stay inside a thread and the others inside the
// warp. Stage 2: one thread block of 1024 threads, thread j is lane j.
//
// Bytes moved per block: 4 written by the first level and read twice here (mostly from L2), 1
// written. Bound: launch latency; this is 1/64 of the elements' work.
#include "double_quantize.h"

#include <cstdint>

#include "device/decode.cuh"
#include "device/encode.cuh"
#include "device/warp_reduce.cuh"
#include "host/launch.h"

namespace qlora_native::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kSlotsPerLane = kGroupSize / kWarpSize;
constexpr int kSumLanes = 1024;

__device__ __forceinline__ int64_t group_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
}

__global__ void __launch_bounds__(kThreads)
    sum_groups_kernel(const float* absmax, int64_t blocks, int64_t groups, double* partials,
                      int32_t* finite_counts) {
  const int64_t group = group_of_warp();
  if (group >= groups) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  double slots[kSlotsPerLane];
  int finite_count = 0;
#pragma unroll
  for (int j = 0; j < kSlotsPerLane; ++j) {
    const int64_t block = group * kGroupSize + j * kWarpSize + lane;
    const float value = block < blocks ? absmax[block] : 0.0f;
    const bool is_finite = abs_bits(value) < kInfinityBits;
    slots[j] = is_finite ? static_cast<double>(value) : 0.0;
    finite_count += __popc(__ballot_sync(kAllLanes, is_finite && block < blocks));
  }
#pragma unroll
  for (int stride = kSlotsPerLane / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int j = 0; j < stride; ++j) slots[j] += slots[j + stride];
  }
  const double sum = warp_tree_sum(slots[0]);
  if (lane == 0) {
    partials[group] = sum;
    finite_counts[group] = finite_count;
  }
}

/// Replaces slots[0] by the pairwise tree over them, in thread 0.
template <class T>
__device__ __forceinline__ T block_tree_sum(T* slots, T value) {
  const int thread = static_cast<int>(threadIdx.x);
  slots[thread] = value;
  for (int stride = kSumLanes / 2; stride >= kWarpSize; stride /= 2) {
    __syncthreads();
    if (thread < stride) slots[thread] += slots[thread + stride];
  }
  return thread < kWarpSize ? warp_tree_sum(slots[thread]) : T{};
}

__global__ void __launch_bounds__(kSumLanes)
    mean_kernel(const double* partials, const int32_t* finite_counts, int64_t groups,
                float* offset) {
  __shared__ double sum_slots[kSumLanes];
  __shared__ long long count_slots[kSumLanes];
  double sum = 0.0;
  long long count = 0;
  for (int64_t group = threadIdx.x; group < groups; group += kSumLanes) {
    sum += partials[group];
    count += finite_counts[group];
  }
  sum = block_tree_sum(sum_slots, sum);
  count = block_tree_sum(count_slots, count);
  if (threadIdx.x == 0) {
    *offset = count == 0 ? 0.0f : __double2float_rn(__ddiv_rn(sum, static_cast<double>(count)));
  }
}

__global__ void __launch_bounds__(kThreads)
    encode_absmax_kernel(const float* absmax, int64_t blocks, int64_t groups, const float* offset,
                         float* absmax2, uint8_t* codes) {
  // The map's points are read at random: from shared memory. As words, because a shared variable
  // cannot have the initializers of a DynamicMap.
  constexpr int kWords = sizeof(DynamicMap) / sizeof(uint32_t);
  __shared__ uint32_t map_words[kWords];
  const auto* const source = reinterpret_cast<const uint32_t*>(&kDynamicMapOnDevice);
  for (int i = static_cast<int>(threadIdx.x); i < kWords; i += kThreads) map_words[i] = source[i];
  __syncthreads();
  const auto& map = *reinterpret_cast<const DynamicMap*>(map_words);

  const int64_t group = group_of_warp();
  if (group >= groups) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const float mean = *offset;
  float deviations[kSlotsPerLane];
  uint32_t max_bits = 0;
#pragma unroll
  for (int j = 0; j < kSlotsPerLane; ++j) {
    const int64_t block = group * kGroupSize + j * kWarpSize + lane;
    deviations[j] = block < blocks ? __fsub_rn(absmax[block], mean) : 0.0f;
    max_bits = max(max_bits, abs_bits(deviations[j]));
  }
  const ScaleOf scale(group_max(max_bits, kWarpSize));
  if (lane == 0) absmax2[group] = scale.absmax;
#pragma unroll
  for (int j = 0; j < kSlotsPerLane; ++j) {
    const int64_t block = group * kGroupSize + j * kWarpSize + lane;
    if (block < blocks) {
      codes[block] = scale.valid ? encode_dynamic(map, __fmul_rn(deviations[j], scale.reciprocal))
                                 : kSignedDynamicZeroCode;
    }
  }
}

}  // namespace

int64_t double_quantize_scratch_bytes(int64_t blocks) {
  return num_groups(blocks) * static_cast<int64_t>(sizeof(double) + sizeof(int32_t));
}

void double_quantize(const float* absmax, int64_t blocks, const float* pinned_offset,
                     const MutableAbsmax& out, void* scratch, cudaStream_t stream) {
  const int64_t groups = num_groups(blocks);
  const LaunchShape warp_per_group{ceil_div(groups, kWarps), kThreads};
  if (pinned_offset == nullptr) {
    auto* const partials = static_cast<double*>(scratch);
    auto* const finite_counts = reinterpret_cast<int32_t*>(partials + groups);
    launch("quantize_4bit sum of groups", sum_groups_kernel, warp_per_group, stream, absmax, blocks,
           groups, partials, finite_counts);
    launch("quantize_4bit mean of absmax", mean_kernel, {1, kSumLanes}, stream, partials,
           finite_counts, groups, out.offset);
  } else if (pinned_offset != out.offset) {
    QN_CUDA_TRY(cudaMemcpyAsync(out.offset, pinned_offset, sizeof(float), cudaMemcpyDeviceToDevice,
                                stream));
  }
  launch("quantize_4bit absmax codes", encode_absmax_kernel, warp_per_group, stream, absmax, blocks,
         groups, out.offset, out.absmax2, out.codes);
}

}  // namespace qlora_native::cuda
