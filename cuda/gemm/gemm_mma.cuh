// Y[M,N] = X[M,K] * W[N,K]^T + bias for up to 16 rows of X, on tensor cores (mma.sync), X and Y in 16 bits,
// fp32 accumulation.
//
//   Unit: 64 elements of K, which share a scale in every row of W.
//   A warp holds 256 elements of K of all rows of X in registers, as the fragments of mma, and goes through
//   tiles of 16 rows of W, 2 KB of codes: a step is a tile for 16 rows of X, two tiles for eight. A unit's
//   four mma are summed unscaled, then multiplied by the scales of its rows. Within a unit the mma's order
//   of k is the lanes' own: lane t of a group has 16 consecutive elements of every row, and of x the same ones.
//   Thread block: 16 warps = row_groups x k_warps, one block per SM, over consecutive tiles. Where K has
//   more shares than 16, slabs of it belong to different thread blocks, which bring their sums together
//   in the workspace: to read x again for every tile would take longer than to read the weights.
//
// Codes come as boxes of the tensor copy engine through a ring per warp, a step or two ahead, swizzled by 128
// bytes. Row g of an mma is row 2g or, from 4 on, 2g - 7 of the tile: then what half a warp reads at a time
// lies in all banks. Values are looked up by pairs (PairTable). A lane decodes the scales of unit t, the
// others of its group get them by a shuffle.
//
// What does not depend on the kernel before is done while that one ends: barriers and table; the first codes
// are on their way to the L2 cache.
//
// Sums of a step: the k_warps leave their fragments in shared memory and, one step later, each adds up a part of
// them. Sums of a pass of tiles are then written. All in fixed order: the same arguments give the same bits, and
// a row of Y does not depend on the other rows of X.
//
// Bytes moved: N * K * (1/2 + scales) + slabs' sums; x from L2, K / slabs of every row by each SM. Bound: shared
// memory, 33 wavefronts per 1024 weights for eight rows and 36 for 16 (16 lookups, 8 for codes), of which it gets
// through four in five clocks; memory would take 28.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/async_copy.cuh"
#include "device/decode.cuh"
#include "device/grid_dependency.cuh"
#include "device/mbarrier.cuh"
#include "device/mma.cuh"
#include "device/pair_fragment.cuh"
#include "device/pair_table.cuh"
#include "device/shared_memory.cuh"
#include "device/tensor_copy.cuh"
#include "device/warp_reduce.cuh"
#include "device/warp_ring.cuh"
#include "device/warp_uniform.cuh"
#include "gemm/gemm_mma_layout.cuh"
#include "gemm/gemm_mma_sums.cuh"

namespace qlora_native::cuda::gemm_mma_kernels {

extern __shared__ __align__(1024) char shared[];

template <class T, int kGroups, bool kDoubleQuant>
__device__ __forceinline__ void multiply(const GemmMmaParams<T>& p) {
  using Step = StepOf<kGroups>;
  using Layout = LayoutOf<kGroups>;
  allow_next_kernel();
  const auto& plan = p.plan;
  const uint32_t shared_base = shared_address(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = uniform(thread / kWarpSize);
  const int g = lane / 4;
  const int t = lane % 4;
  const int row_group = warp * p.k_warps_inverse >> 16;
  const int k_warp = warp - row_group * plan.k_warps;
  const uint32_t table_at = kWindow - shared_base % kWindow;
  if (table_at < Layout::kBefore) __trap();  // the system's part has grown
  const PairTable table(shared_base + table_at, lane);
  typename Step::Ring ring(shared_base + table_at + Layout::ring_at(warp),
                           shared_base + kBarriersAt + warp * Step::Ring::kBarriersBytes);
  const uint32_t step_barriers = shared_base + kStepBarriersAt + row_group * 2 * kBarrierBytes;

  const int block = static_cast<int>(blockIdx.x);
  const int slab = plan.slabs - 1 - block / plan.parts;
  const int part = block % plan.parts;
  const int tile_begin = plan.first_tile_of(part);
  const int tile_end = plan.first_tile_of(part + 1);
  const int first_tile =
      row_group >= plan.row_groups ? tile_end : tile_begin + row_group * Step::kTiles;
  const int stride = plan.row_groups * Step::kTiles;  // from a step's first tile to the next one's
  const int unit0 = (slab * plan.k_warps + k_warp) * kShareUnits;

  if (elect_lane()) {
    const uint32_t barriers = shared_base + kStepBarriersAt + warp * 2 * kBarrierBytes;
    init_barrier(barriers, plan.k_warps);
    init_barrier(barriers + kBarrierBytes, plan.k_warps);
  }
  ring.init();
  if (thread == 0) prefetch_map(p.codes);
  {
    // A row of the first tiles by each warp.
    const int row = tile_begin * kTileRows + warp;
    const int slab_unit = slab * plan.k_warps * kShareUnits;
    const int units = min(plan.k_warps * kShareUnits, p.units - slab_unit);
    if (row < p.n && units > 0 && elect_lane()) {
      prefetch_l2(p.packed + (static_cast<uint64_t>(row) * p.units + slab_unit) * 32, units * 32);
      if (tile_begin + 1 < tile_end && row + kTileRows < p.n) {
        prefetch_l2(p.packed + (static_cast<uint64_t>(row + kTileRows) * p.units + slab_unit) * 32,
                    units * 32);
      }
    }
  }
  PairTable::fill<T>(shared + table_at, p.table.values, thread, kThreads);
  if (kDoubleQuant && thread < 256) {
    reinterpret_cast<float*>(shared)[thread] = kDynamicMapOnDevice.values[thread];
  }
  __syncthreads();
  wait_for_previous_kernel();

  float offset = 0.0f;
  if constexpr (kDoubleQuant) offset = load_after_wait(p.scales.offset);
  // Row g of an mma; row g + 8 is eight further.
  const int own_row = g % 4 * 2 + g / 4;
  const bool unit_exists = unit0 + t < p.units;
  const int unit_shift = p.scales.block_shift - 6;
  const uint32_t last_unit = static_cast<uint32_t>(p.n) * p.units - 1;
  uint32_t scale_unit = static_cast<uint32_t>(first_tile * kTileRows + own_row) * p.units +
                        min(unit0 + t, p.units - 1);
  RawScale raw[2 * Step::kTiles] = {};  // of the next step
  const auto fetch_scales = [&](int tile) {
    if (tile >= tile_end) return;
#pragma unroll
    for (int i = 0; i < 2 * Step::kTiles; ++i) {
      const uint32_t index = min(scale_unit + i * 8 * p.units, last_unit) >> unit_shift;
      if constexpr (kDoubleQuant) {
        raw[i] = {load_after_wait(p.scales.absmax2 + index / kGroupSize),
                  load_after_wait(p.scales.codes + index)};
      } else {
        raw[i] = {load_after_wait(p.scales.values + index), 0};
      }
    }
    scale_unit += stride * kTileRows * p.units;
  };
  const auto fill = [&](int tile) {
    if (tile >= tile_end) return;
    const bool has_two = Step::kTiles > 1 && tile + 1 < tile_end;
    ring.fill(has_two ? 2 * kTileBytes : kTileBytes, [&](uint32_t stage, uint32_t barrier) {
      copy_box(stage, p.codes, unit0 * 32, tile * kTileRows, barrier);
      if (has_two) {
        copy_box(stage + kTileBytes, p.codes, unit0 * 32, (tile + 1) * kTileRows, barrier);
      }
    });
  };

  fetch_scales(first_tile);
  uint4 x[kGroups][kShareUnits][2];  // of token g of a group, the lane's 16 elements of a unit
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int token = group * 8 + g;
    const T* const row = p.x + token * p.x_stride + t * 16;
#pragma unroll
    for (int unit = 0; unit < kShareUnits; ++unit) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[group][unit][half] = make_uint4(0, 0, 0, 0);
        if (token < p.m && unit0 + unit < p.units && first_tile < tile_end) {
          x[group][unit][half] = load_after_wait(
              reinterpret_cast<const uint4*>(row + (unit0 + unit) * kUnit + half * 8));
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i + 1 < Step::kStages; ++i) fill(first_tile + i * stride);

  // Of warp 0 of the row group.
  const uint32_t fragments =
      shared_base + table_at + 128 + row_group * plan.k_warps * Fragments::kWarpBytes;
  const uint32_t own_fragment =
      fragments + k_warp * Fragments::kWarpBytes + Fragments::at(lane * 4, k_warp);
  const uint32_t lane_codes = own_row * kRowBytes + (t / 2 ^ own_row % 8) * 16 + t % 2 * 8;
  uint32_t turn = 0;  // steps that this row group has begun

  // Adds up the warp's part of the fragments of the step before.
  const auto reduce = [&](int step_of_pass) {
    const uint32_t before = turn - 1;
    wait_barrier(step_barriers + before % 2 * kBarrierBytes, before / 2 % 2);
    const int sharer = lane / Fragments::kPiece;
    for (int piece = k_warp; piece < kWarps; piece += plan.k_warps) {
      const int element = piece * Fragments::kPiece + lane % Fragments::kPiece;
      const uint32_t from = fragments + before % 2 * Fragments::kStepBytes +
                            sharer * Fragments::kWarpBytes + Fragments::at(element, sharer);
      float parts[Fragments::kLoads] = {};
#pragma unroll
      for (int i = 0; i < Fragments::kLoads; ++i) {
        load_shared_if(parts[i], from + i * Fragments::kSharers * Fragments::kWarpBytes,
                       sharer + i * Fragments::kSharers < plan.k_warps);
      }
#pragma unroll
      for (int i = 1; i < Fragments::kLoads; ++i) parts[0] += parts[i];
      const float sum = parts[0] + __shfl_xor_sync(kAllLanes, parts[0], Fragments::kPiece);
      if (sharer == 0) {
        store_shared(shared_base + kSumsAt + (step_of_pass * Fragments::kElements + element) * 4,
                     sum);
      }
    }
  };

  int tile = first_tile;
  int pass = 0;
  for (int pass_begin = tile_begin; pass_begin < tile_end; pass_begin += kGemmMmaPassTiles) {
    const int pass_end = min(pass_begin + kGemmMmaPassTiles, tile_end);
    int step_before = -1;  // of this pass
    // Of kTiles tiles, or fewer at the end.
    const auto take_step = [&](auto tiles) {
      constexpr int kTiles = decltype(tiles)::value;
      float scale[2 * kTiles];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        if constexpr (kDoubleQuant) {
          scale[i] = decode_scale(load_shared(shared_base + raw[i].code * 4), raw[i].value, offset);
        } else {
          scale[i] = raw[i].value;
        }
        scale[i] = unit_exists ? scale[i] * p.table.scale_inverse : 0.0f;
      }
      const uint32_t codes = ring.acquire() + lane_codes;
      fetch_scales(tile + stride);
      fill(tile + (Step::kStages - 1) * stride);
      constexpr int kMmas = kTiles * kGroups;
      float sums[kMmas][4] = {};
#pragma unroll
      for (int unit = 0; unit < kShareUnits; ++unit) {
        float dot[kMmas][4] = {};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const uint32_t at = (codes ^ unit * 32) + i * kTileBytes;
          const uint2 low_codes = load_shared2(at);
          const uint2 high_codes = load_shared2(at + 8 * kRowBytes);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            uint32_t a[4];
            look_up_fragment(table, low_codes, high_codes, j, a);
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
              const uint4 v = x[group][unit][j / 2];
              float(&sum)[4] = dot[i * kGroups + group];
              mma_m16n8k16<T>(sum, a, j % 2 == 0 ? v.x : v.z, j % 2 == 0 ? v.y : v.w, sum);
            }
          }
        }
#pragma unroll
        for (int mma = 0; mma < kMmas; ++mma) {
          const float low_scale = __shfl_sync(kAllLanes, scale[mma / kGroups * 2], unit, 4);
          const float high_scale = __shfl_sync(kAllLanes, scale[mma / kGroups * 2 + 1], unit, 4);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[mma][i] = fmaf(dot[mma][i], i < 2 ? low_scale : high_scale, sums[mma][i]);
          }
        }
      }
      if (step_before >= 0) reduce(step_before);
      step_before = (tile - pass_begin) / Step::kTiles;
#pragma unroll
      for (int mma = 0; mma < kMmas; ++mma) {
        store_shared(
            own_fragment + turn % 2 * Fragments::kStepBytes + mma * (Fragments::kWarpBytes / 2),
            make_uint4(__float_as_uint(sums[mma][0]), __float_as_uint(sums[mma][1]),
                       __float_as_uint(sums[mma][2]), __float_as_uint(sums[mma][3])));
      }
      __syncwarp();  // the stage has been read, the fragments are written
      if (lane == 0) arrive(step_barriers + turn % 2 * kBarrierBytes);
      ++turn;
    };
    for (; tile + Step::kTiles <= pass_end; tile += stride) {
      take_step(std::integral_constant<int, Step::kTiles>{});
    }
    if constexpr (Step::kTiles > 1) {
      if (tile < pass_end) {
        take_step(std::integral_constant<int, 1>{});
        tile += stride;
      }
    }
    if (step_before >= 0) reduce(step_before);
    __syncthreads();

    write_pass<T, kGroups>(p, {slab, part, pass, pass_begin, pass_end}, shared_base + kSumsAt,
                           thread);
    ++pass;
  }
}

}  // namespace qlora_native::cuda::gemm_mma_kernels
