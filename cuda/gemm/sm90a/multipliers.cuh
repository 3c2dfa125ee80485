// The multipliers of kernel.cuh: from codes and boxes to the sums of a tile.
#pragma once

#include <cstdint>

#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"
#include "gemm/sm90a/fragments.cuh"
#include "gemm/sm90a/layout.cuh"
#include "gemm/sm90a/partial_sums.cuh"

namespace qlora_native::cuda::sm90a {

// 0 is __syncthreads().
constexpr int kBarrierOfPanel = 1;
constexpr int kBarrierOfTeams = kBarrierOfPanel + kPanels;

/// Sums of a step, then the scales.
template <class C>
__device__ __forceinline__ void multiply_and_scale(const Shared<C>& shared, uint32_t first_chunk,
                                                   int chunks, int team,
                                                   const FragmentsOf<C>& fragments, int lane,
                                                   float (&sums)[C::kSums]) {
  using T = typename C::Elem;
  const bool leads = lane == 0;
  const uint32_t end_chunk = first_chunk + chunks;
  float part[C::kSums] = {};
  for (RingPosition<C::kChunks> at{first_chunk}; at.count < end_chunk; ++at.count) {
    const int slot = at.slot();
    wait_barrier(shared.chunk_full(slot), at.round());
    const uint32_t scales_at =
        shared.scales(slot) + FragmentsOf<C>::place_of_scale(0, team) + fragments.scale_at;
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
      wgmma<T, false>(part, a, b);
#pragma unroll
      for (int j = 1; j < kStep / 16; ++j) {
        wgmma<T, true>(part, a + 4 * j, b + j * kPanelStep16);
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
        sums[j] = fmaf(part[j], j / 2 % 2 == 0 ? low : high, sums[j]);
      }
    }
  }
}

/// Scaled weights, sums that stay where they are.
template <class C>
__device__ __forceinline__ void scale_and_multiply(const Shared<C>& shared, uint32_t first_chunk,
                                                   int chunks, int team,
                                                   const FragmentsOf<C>& fragments, int lane,
                                                   float (&sums)[C::kSums]) {
  using T = typename C::Elem;
  constexpr int kSteps = kChunkSteps / C::kTeams;  // of a chunk
  static_assert(kSteps % 2 == 0);
  const bool leads = lane == 0;
  const uint32_t end_chunk = first_chunk + chunks;
  uint32_t a[2][16];
  const auto decode = [&](int slot, int i, uint32_t(&to)[16]) {
    fragments.decode(shared.codes(slot), shared.scales(slot), i * C::kTeams + team, to);
  };
  RingPosition<C::kChunks> at{first_chunk};
  RingPosition<C::kBoxes> box_at{first_chunk * kChunkSteps + team};
  const auto release_box_before = [&] {
    if (leads) arrive(shared.box_empty((box_at.count + C::kBoxes - C::kTeams) % C::kBoxes));
  };
  wait_barrier(shared.chunk_full(at.slot()), at.round());
  decode(at.slot(), 0, a[0]);
  wgmma_order(sums);
  while (at.count < end_chunk) {
    const int slot = at.slot();
    ++at.count;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int box = box_at.slot();
      wait_barrier(shared.box_full(box), box_at.round());
      const uint64_t b = panel_descriptor(shared.box(box));
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kStep / 16; ++j) {
        wgmma<T, true>(sums, a[i % 2] + 4 * j, b + j * kPanelStep16);
      }
      wgmma_commit();
      wgmma_wait<1>();
      // Of the step before: its fragments are free, too.
      if (i > 0 || at.count > first_chunk + 1) release_box_before();
      box_at.count += C::kTeams;
      if (i + 1 < kSteps) {
        decode(slot, i + 1, a[(i + 1) % 2]);
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
  wgmma_order(sums);
  release_box_before();
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
  const auto fragments = FragmentsOf<C>::of(shared.table, warp, lane);
  uint32_t first_chunk = 0;
  for (Segments segment(plan, block); segment.next();) {
    float sums[C::kSums] = {};
    if constexpr (C::kScalesWeights) {
      scale_and_multiply(shared, first_chunk, segment.chunks, team, fragments, lane, sums);
    } else {
      multiply_and_scale(shared, first_chunk, segment.chunks, team, fragments, lane, sums);
    }
    if constexpr (C::kTeams > 1) join_teams(shared, team, warp, lane, sums);
    first_chunk += segment.chunks;
    if (team != 0) continue;
    if (segment.first > 0) {
      give_sums<C>(p, block, warp, lane, sums);
      continue;
    }
    const int end = (segment.tile + 1) * plan.chunks;
    for (int other = block + 1; other < plan.grid && plan.first_chunk_of(other) < end; ++other) {
      take_sums<C>(p, other, warp, lane, sums);
    }
    constexpr auto kOrder = C::kTransposed ? PanelOrder::kNeighbours : PanelOrder::kEightApart;
    write_tile<kOrder>(p.out, segment.first_row, segment.first_col + panel * kPanelRows,
                       shared.out(panel), kBarrierOfPanel + panel, thread, sums);
  }
}

}  // namespace qlora_native::cuda::sm90a
