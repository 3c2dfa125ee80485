// The multipliers of gemm_sm90a.cu: from codes and boxes to the sums of a tile.
#pragma once

#include <cstdint>

#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"
#include "gemm/sm90a/forward/fixed_point.cuh"
#include "gemm/sm90a/forward/fragments.cuh"
#include "gemm/sm90a/forward/layout.cuh"
#include "gemm/sm90a/forward/partial_sums.cuh"

namespace qlora_native::cuda::sm90a::forward {

// 0 is __syncthreads().
constexpr int kBarrierOfPanel = 1;
constexpr int kBarrierOfTeams = kBarrierOfPanel + kPanels;

/// Few rows: sums of a step, then the scales.
template <class C>
__device__ __forceinline__ void multiply_and_scale(const Shared<C>& shared, uint32_t first_chunk,
                                                   int chunks, int team, int row, int lane,
                                                   typename C::Sums& sums) {
  using T = typename C::Elem;
  const Fragments fragments = Fragments::of(shared.table, row, lane);
  const bool leads = lane == 0;
  const uint32_t end_chunk = first_chunk + chunks;
  float part[C::kSums] = {};
  for (RingPosition<C::kChunks> at{first_chunk}; at.count < end_chunk; ++at.count) {
    const int slot = at.slot();
    wait_barrier(shared.chunk_full(slot), at.round());
    const uint32_t scales_at = shared.scales(slot) + (team * kTileCols + row) * 8;
    const uint2 low_scales = load_shared2(scales_at);
    const uint2 high_scales = load_shared2(scales_at + 8 * 8);
#pragma unroll
    for (int i = 0; i < kChunkSteps / C::kTeams; ++i) {
      const int step = 2 * i + team;
      uint4 words[4];
      uint32_t a[16];
      fragments.load(shared.codes(slot), step, words);
      fragments.look_up(words, a);
      const RingPosition<C::kBoxes> box_at{at.count * kChunkSteps + step};
      const int box = box_at.slot();
      wait_barrier(shared.box_full(box), box_at.round());
      wgmma_order(part);
      wgmma_fence();
      const uint64_t b = panel_descriptor(shared.box(box));
      wgmma_registers<T, false>(part, a, b);
#pragma unroll
      for (int j = 1; j < kStep / 16; ++j) {
        wgmma_registers<T, true>(part, a + 4 * j, b + j * kPanelStep16<false>);
      }
      wgmma_commit();
      if (i + 1 == kChunkSteps / C::kTeams) {
        __syncwarp();
        if (leads) arrive(shared.chunk_empty(slot));
      }
      wgmma_wait<0>();
      wgmma_order(part);
      if (leads) arrive(shared.box_empty(box));
      const float low = __uint_as_float(i == 0 ? low_scales.x : low_scales.y);
      const float high = __uint_as_float(i == 0 ? high_scales.x : high_scales.y);
#pragma unroll
      for (int j = 0; j < C::kSums; ++j) {
        sums[0][j] = fmaf(part[j], j / 2 % 2 == 0 ? low : high, sums[0][j]);
      }
    }
  }
}

/// Many rows: scaled weights, sums that stay where they are.
template <class C>
__device__ __forceinline__ void scale_and_multiply(const Shared<C>& shared, uint32_t first_chunk,
                                                   int chunks, int row, int lane,
                                                   typename C::Sums& sums) {
  using T = typename C::Elem;
  const Fragments fragments = Fragments::of(shared.table, row, lane);
  const bool leads = lane == 0;
  const uint32_t end_chunk = first_chunk + chunks;
  uint32_t a[2][16];
  const auto decode = [&](int slot, int step, uint32_t(&to)[16]) {
    uint4 words[4];
    fragments.load(shared.codes(slot), step, words);
    const uint32_t scales_at = shared.scales(slot) + (step * kTileCols + row) * 8;
    const uint2 low = load_shared2(scales_at);
    const uint2 high = load_shared2(scales_at + 8 * 8);
    fragments.look_up(words, to);
#pragma unroll
    for (int i = 0; i < 16; ++i) to[i] = scale_pair<T>(to[i], i % 2 == 0 ? low : high);
  };
  RingPosition<C::kChunks> at{first_chunk};
  RingPosition<C::kBoxes> box_at{first_chunk * kChunkSteps};
  wait_barrier(shared.chunk_full(at.slot()), at.round());
  decode(at.slot(), 0, a[0]);
  wgmma_order(sums[0]);
  while (at.count < end_chunk) {
    const int slot = at.slot();
    ++at.count;
#pragma unroll
    for (int step = 0; step < kChunkSteps; ++step) {
      const int box = box_at.slot();
      wait_barrier(shared.box_full(box), box_at.round());
      const uint64_t b = panel_descriptor(shared.box(box));
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kStep / 16; ++j) {
        wgmma_registers<T, true>(sums[0], a[step % 2] + 4 * j, b + j * kPanelStep16<false>);
      }
      wgmma_commit();
      wgmma_wait<1>();
      // Of the step before: its fragments are free, too.
      if (step > 0 || at.count > first_chunk + 1) {
        if (leads) arrive(shared.box_empty((box_at.count + C::kBoxes - 1) % C::kBoxes));
      }
      ++box_at.count;
      if (step + 1 < kChunkSteps) {
        decode(slot, step + 1, a[(step + 1) % 2]);
      } else {
        __syncwarp();
        if (leads) arrive(shared.chunk_empty(slot));
        if (at.count < end_chunk) {
          wait_barrier(shared.chunk_full(at.slot()), at.round());
          decode(at.slot(), 0, a[0]);
        }
      }
    }
  }
  wgmma_wait<0>();
  wgmma_order(sums[0]);
  if (leads) arrive(shared.box_empty((box_at.count + C::kBoxes - 1) % C::kBoxes));
}

/// Adds the second team's sums to the first's.
template <class C>
__device__ __forceinline__ void join_teams(const Shared<C>& shared, int team, int warp, int lane,
                                           float (&sums)[C::kSums]) {
  // By way of the table's gaps, a word for each of 32 lanes.
  const uint32_t gaps = shared.table + 128 + lane * 4 + warp * C::kSums * PairTable::kStride;
  sync_some(kBarrierOfTeams,
            C::kMultipliers * kWarpgroup);  // those of the segment before have been read
  if (team == 1) {
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) store_shared(gaps + i * PairTable::kStride, sums[i]);
  }
  sync_some(kBarrierOfTeams, C::kMultipliers * kWarpgroup);
  if (team == 0) {
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) sums[i] += load_shared(gaps + i * PairTable::kStride);
  }
}

template <class C>
__device__ __forceinline__ void multiply(const Params<typename C::Elem>& p, const Shared<C>& shared,
                                         int block, int multiplier, int thread) {
  const auto& plan = p.plan;
  const int lane = thread % kWarpSize;
  const int panel = multiplier % kPanels;
  const int team = multiplier / kPanels;
  const int warp = panel * 4 + thread / kWarpSize;  // of the team
  const int row = warp * 16 + lane / 4;
  uint32_t first_chunk = 0;
  for (Segments segment(plan, block); segment.next();) {
    typename C::Sums sums = {};
    if constexpr (C::kScalesWeights) {
      scale_and_multiply(shared, first_chunk, segment.chunks, row, lane, sums);
    } else {
      multiply_and_scale(shared, first_chunk, segment.chunks, team, row, lane, sums);
      join_teams(shared, team, warp, lane, sums[0]);
    }
    first_chunk += segment.chunks;
    if (team != 0) continue;
    if (segment.first > 0) {
      give_sums<C>(p, block, warp, lane, sums[0]);
      continue;
    }
    const int end = (segment.tile + 1) * plan.chunks;
    for (int other = block + 1; other < plan.grid && plan.first_chunk_of(other) < end; ++other) {
      take_sums<C>(p, other, warp, lane, sums[0]);
    }
    write_tile(p.out, segment.first_row, segment.first_col + panel * kPanelRows, shared.out(panel),
               kBarrierOfPanel + panel, thread, sums);
  }
}

}  // namespace qlora_native::cuda::sm90a::forward
