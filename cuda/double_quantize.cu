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
// Stage 1 (device/group_sum.cuh) is done by the first level where a thread block of it holds whole
// groups, else by sum_groups_kernel: a warp per group, lane l owns slots l, l + 32, ..., l + 224,
// so that strides of 32 and more stay inside a thread and the others inside the warp.
//
// Stage 2 and the encoding are one launch of at most 128 thread blocks of 1024 threads. Every thread
// block sums stage 2 for itself, thread j being lane j: the partials lie in the L2 cache, and a
// launch more would cost more. Then each of its warps encodes groups, with the search of the map in
// shared memory.
//
// Bytes moved per block: 4 written by the first level and read here (from L2), 1 written; 12 per
// group and thread block. Bound: latencies, 2 to 3 us; this is 1/64 of the elements' work.
#include "double_quantize.h"

#include <algorithm>
#include <cstdint>

#include "device/dynamic_code.cuh"
#include "device/encode.cuh"
#include "device/group_sum.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "host/launch.h"
#include "nearest_code.h"

namespace qlora_native::cuda {
namespace {

constexpr int kSumWarps = 8;
constexpr int kSumThreads = kSumWarps * kWarpSize;
constexpr int kSumLanes = 1024;
constexpr int kEncodeWarps = kSumLanes / kWarpSize;
constexpr int kMaxEncodeBlocks = 128;

/// The slots of `group` that a lane holds; NaN where the array has ended.
__device__ __forceinline__ void load_group(const float* absmax, int64_t blocks, int64_t group,
                                           float (&values)[kSlotsPerLane]) {
  const int64_t first = group * kGroupSize + threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < kSlotsPerLane; ++j) {
    const int64_t block = first + j * kWarpSize;
    values[j] = block < blocks ? absmax[block] : __uint_as_float(kNaNBits);
  }
}

__global__ void __launch_bounds__(kSumThreads)
    sum_groups_kernel(const float* absmax, int64_t blocks, int64_t groups, GroupSums sums) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kSumWarps + threadIdx.x / kWarpSize;
  if (group >= groups) return;
  float values[kSlotsPerLane];
  load_group(absmax, blocks, group, values);
  sum_group(values, group, sums);
}

/// A thread's lane of stage 2, before the tree over the lanes.
struct LaneSum {
  double sum = 0.0;
  long long count = 0;
};

__device__ __forceinline__ LaneSum sum_lane(const GroupSums& sums, int64_t groups) {
  constexpr int kAhead = 4;  // loads in flight
  LaneSum lane;
  for (int64_t first = threadIdx.x; first < groups; first += kAhead * kSumLanes) {
    double partials[kAhead];
    int32_t counts[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t group = first + i * kSumLanes;
      partials[i] = group < groups ? sums.partials[group] : 0.0;
      counts[i] = group < groups ? sums.finite_counts[group] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      // A zero that is added past the end changes nothing: no sum is negative.
      lane.sum += partials[i];
      lane.count += counts[i];
    }
  }
  return lane;
}

/// The mean from the lanes of a thread block of 1024 threads, in every thread.
__device__ __forceinline__ float mean_of_lanes(LaneSum lane_sum) {
  // One column more than there are, so that columns and rows are read without bank conflicts.
  __shared__ double slots[kWarpSize][kWarpSize + 1];
  __shared__ double columns[kWarpSize];
  __shared__ long long counts[kWarpSize];
  __shared__ float mean;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  slots[warp][lane] = lane_sum.sum;
  const long long count = warp_tree_sum(lane_sum.count);
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  // Strides 512 to 32 of the tree are strides 16 to 1 over the rows of a column: a warp each.
  const double column = warp_tree_sum(slots[lane][warp]);
  if (lane == 0) columns[warp] = column;
  __syncthreads();
  if (warp == 0) {
    const double total = warp_tree_sum(columns[lane]);
    const long long finite = warp_tree_sum(counts[lane]);
    if (lane == 0) {
      mean = finite == 0 ? 0.0f : __double2float_rn(__ddiv_rn(total, static_cast<double>(finite)));
    }
  }
  __syncthreads();
  return mean;
}

/// What the search of the dynamic map reads, at random: it belongs into shared memory. As words,
/// which a thread block copies at once.
static __device__ const SignedCodeTable kCodeTable = kSignedCodeTable;
constexpr int kTableVectors = sizeof(SignedCodeTable) / sizeof(uint4);

struct EncodeParams {
  const float* absmax;
  int64_t blocks;
  int64_t groups;
  const float* pinned_offset;
  GroupSums sums;
  MutableAbsmax out;
  bool codes_are_aligned;  ///< to 8 bytes
};

/// Blocks of `group` that a lane encodes: eight neighbours, whichever slots of the sum they are.
__device__ __forceinline__ int64_t first_block_of_lane(int64_t group) {
  return group * kGroupSize + threadIdx.x % kWarpSize * kSlotsPerLane;
}

/// Zeros where the array has ended. The workspace is aligned for 16-byte loads.
__device__ __forceinline__ void load_absmax(const EncodeParams& p, int64_t group,
                                            float (&values)[kSlotsPerLane]) {
  const int64_t first = first_block_of_lane(group);
  if (first + kSlotsPerLane <= p.blocks) {
    load8<true>(p.absmax + first, values);
  } else {
    load8_partial(p.absmax + first, p.blocks - first, values);
  }
}

__device__ __forceinline__ void store_codes(const EncodeParams& p, int64_t group,
                                            const uint32_t (&codes)[kSlotsPerLane]) {
  const int64_t first = first_block_of_lane(group);
  uint8_t* const target = p.out.codes + first;
  if (p.codes_are_aligned && first + kSlotsPerLane <= p.blocks) {
    *reinterpret_cast<uint2*>(target) =
        make_uint2(codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24,
                   codes[4] | codes[5] << 8 | codes[6] << 16 | codes[7] << 24);
  } else {
#pragma unroll
    for (int j = 0; j < kSlotsPerLane; ++j) {
      if (first + j < p.blocks) target[j] = static_cast<uint8_t>(codes[j]);
    }
  }
}

__device__ __forceinline__ void encode_group(const EncodeParams& p, const SignedCodeTable& tables,
                                             float offset, int64_t group,
                                             float (&values)[kSlotsPerLane]) {
  const int64_t first = first_block_of_lane(group);
  uint32_t max_bits = 0;
#pragma unroll
  for (int j = 0; j < kSlotsPerLane; ++j) {
    values[j] = __fsub_rn(values[j], offset);
    if (first + j < p.blocks) max_bits = max(max_bits, abs_bits(values[j]));
  }
  const ScaleOf scale(group_max(max_bits, kWarpSize));
  if (threadIdx.x % kWarpSize == 0) p.out.absmax2[group] = scale.absmax;
  uint32_t codes[kSlotsPerLane];
#pragma unroll
  for (int j = 0; j < kSlotsPerLane; ++j) {
    // Of a NaN too: its place lies in the tables, and the code is not used.
    const uint32_t code = find_code(tables, __fmul_rn(values[j], scale.reciprocal));
    codes[j] = scale.valid ? code : kSignedDynamicZeroCode;
  }
  store_codes(p, group, codes);
}

__global__ void __launch_bounds__(kSumLanes)
    encode_absmax_kernel(const __grid_constant__ EncodeParams p) {
  __shared__ uint4 table_vectors[kTableVectors];
  static_assert(kTableVectors <= kSumLanes);
  // All loads are issued before anything waits for one.
  uint4 table_vector{};
  if (threadIdx.x < kTableVectors) {
    table_vector = reinterpret_cast<const uint4*>(&kCodeTable)[threadIdx.x];
  }
  // Warps of different thread blocks take neighbouring groups: all SMs have work when it is little.
  const int64_t step = static_cast<int64_t>(gridDim.x) * kEncodeWarps;
  int64_t group = blockIdx.x + static_cast<int64_t>(threadIdx.x / kWarpSize) * gridDim.x;
  float values[kSlotsPerLane];
  if (group < p.groups) load_absmax(p, group, values);
  float offset = 0.0f;
  LaneSum lane_sum;
  if (p.pinned_offset == nullptr) {
    lane_sum = sum_lane(p.sums, p.groups);
  } else {
    offset = *p.pinned_offset;
  }
  if (threadIdx.x < kTableVectors) table_vectors[threadIdx.x] = table_vector;
  if (p.pinned_offset == nullptr) {
    offset = mean_of_lanes(lane_sum);
  } else {
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && p.out.offset != p.pinned_offset) {
    *p.out.offset = offset;
  }
  const auto& tables = *reinterpret_cast<const SignedCodeTable*>(table_vectors);
  while (group < p.groups) {
    float next[kSlotsPerLane];
    if (group + step < p.groups) load_absmax(p, group + step, next);
    encode_group(p, tables, offset, group, values);
#pragma unroll
    for (int j = 0; j < kSlotsPerLane; ++j) values[j] = next[j];
    group += step;
  }
}

}  // namespace

int64_t group_sums_bytes(int64_t blocks) {
  return num_groups(blocks) * static_cast<int64_t>(sizeof(double) + sizeof(int32_t));
}

GroupSums group_sums(void* scratch, int64_t blocks) {
  auto* const partials = static_cast<double*>(scratch);
  return {partials, reinterpret_cast<int32_t*>(partials + num_groups(blocks))};
}

void sum_groups(const float* absmax, int64_t blocks, const GroupSums& sums, cudaStream_t stream) {
  const int64_t groups = num_groups(blocks);
  launch("quantize_4bit sum of groups", sum_groups_kernel,
         {ceil_div(groups, kSumWarps), kSumThreads}, stream, absmax, blocks, groups, sums);
}

void encode_absmax(const float* absmax, int64_t blocks, const float* pinned_offset,
                   const GroupSums& sums, const MutableAbsmax& out, cudaStream_t stream) {
  const int64_t groups = num_groups(blocks);
  const EncodeParams params{
      absmax, blocks, groups, pinned_offset, sums, out, is_aligned(out.codes, 8)};
  launch("quantize_4bit absmax codes", encode_absmax_kernel,
         {std::min<int64_t>(groups, kMaxEncodeBlocks), kSumLanes}, stream, params);
}

}  // namespace qlora_native::cuda
