// The multipliers of gemm_transposed_sm90a.cu: from panels and boxes to sums, and from sums to dX.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device/cluster.cuh"
#include "device/mbarrier.cuh"
#include "device/pair_table.cuh"
#include "device/shared_memory.cuh"
#include "device/vec_load.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"
#include "gemm/sm90a/out_tile.cuh"
#include "gemm/sm90a/transposed/layout.cuh"

namespace qlora_native::cuda::sm90a::transposed {

/// Puts a multiplier's sums where the other thread blocks of the cluster find them.
template <class C>
__device__ __forceinline__ void share_sums(uint32_t base, int multiplier, int thread,
                                           const typename C::Sums& sums) {
  const int lane = thread % kWarpSize;
  const int col = multiplier * kPanelRows + thread / kWarpSize * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < C::kSums; ++i) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    store_shared(base + (token * C::kSumsPitch + col + i / 2 % 2 * 8) * 4,
                 sums[i / C::kSumsOfHalf][i % C::kSumsOfHalf]);
  }
}

/// Adds the sums of all thread blocks of the cluster for this one's share of the rows.
template <class C>
__device__ __forceinline__ void write_sums(const GemmParams<typename C::Elem>& p, const Work& work,
                                           uint32_t base, int rank, int thread) {
  using T = typename C::Elem;
  constexpr int kThreads = kMultipliers * kWarpgroup;
  const int cluster = p.plan.cluster;
  const int rows = min(C::kTokens, p.out.rows - work.first_row);
  const int lane = thread % kWarpSize;
  const int col = work.first_col + lane * 4;
  if (col >= p.out.cols) return;
  for (int token = thread / kWarpSize * cluster + rank; token < rows;
       token += kThreads / kWarpSize * cluster) {
    const uint32_t at = base + (token * C::kSumsPitch + lane * 4) * 4;
    float sum[4] = {};
    for (int block = 0; block < cluster; ++block) {
      const float4 part = load_cluster4(at, block);
      sum[0] += part.x;
      sum[1] += part.y;
      sum[2] += part.z;
      sum[3] += part.w;
    }
    T* const target = p.out.data + (work.first_row + token) * p.out.row_stride + col;
    if (p.out.is_aligned && col + 4 <= p.out.cols) {
      *reinterpret_cast<uint2*>(target) =
          make_uint2(pack_pair<T>(sum[0], sum[1]), pack_pair<T>(sum[2], sum[3]));
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (col + j < p.out.cols) target[j] = from_float<T>(sum[j]);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void multiply(const GemmParams<typename C::Elem>& p,
                                         const Shared<C>& shared, int cluster, int rank,
                                         int multiplier, int thread) {
  const auto& plan = p.plan;
  const bool leads = thread % kWarpSize == 0;
  const auto release = [&](int stage, int slot) {
    if (!leads) return;
    arrive(shared.empty(stage));
    if (plan.split || plan.cluster == 1) {
      arrive(shared.box_empty(slot));
    } else {
      arrive_at_rank(shared.box_empty(slot), 0);
      arrive_at_rank(shared.box_empty(slot), 1);
    }
  };
  RingPosition<C::kStages> at;
  RingPosition<C::kBoxes> box_at;
  for (int item = cluster; item < plan.items; item += plan.clusters) {
    const Work work = work_of(plan, item, rank);
    typename C::Sums sums = {};
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) wgmma_order(sums[half]);
    int used_stage = 0;
    int used_slot = 0;
    for (int step = 0; step < work.steps; ++step) {
      wait_barrier(shared.box_full(box_at.slot()), box_at.round());
      wait_barrier(shared.full(at.slot()), at.round());
      const uint64_t a = panel_descriptor(shared.weights(at.slot()) + multiplier * kPanelBytes);
      const uint64_t b = panel_descriptor(shared.box(box_at.slot()));
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kStep / 16; ++i) {
#pragma unroll
        for (int half = 0; half < C::kHalves; ++half) {
          constexpr uint64_t kHalfOfBox = C::kActivationBytes / C::kHalves / 16;
          wgmma<typename C::Elem, true>(sums[half], a + i * kPanelStep16<true>,
                                        b + i * kPanelStep16<false> + half * kHalfOfBox);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(used_stage, used_slot);
      used_stage = at.slot();
      used_slot = box_at.slot();
      ++at.count;
      ++box_at.count;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) wgmma_order(sums[half]);
    release(used_stage, used_slot);
    if (plan.split) {
      sync_some(1, kMultipliers * kWarpgroup);  // the stages have been read
      share_sums<C>(shared.base, multiplier, thread, sums);
      cluster_sync_of_any();
      write_sums<C>(p, work, shared.base, rank, multiplier * kWarpgroup + thread);
    } else {
      write_tile(p.out, work.first_row, work.first_col + multiplier * kPanelRows,
                 shared.out(multiplier), 1 + multiplier, thread, sums);
    }
  }
}

}  // namespace qlora_native::cuda::sm90a::transposed
