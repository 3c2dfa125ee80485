// Y[M,N] = X[M,K] * W[N,K]^T + bias for one or two rows of X, on tensor cores (mma.sync), X and Y in 16
// bits, fp32 accumulation.
//
// An mma multiplies 16 rows by 8 columns, here 4 rows of W in 4 segments each by 2 rows of X in the
// same 4 segments; of the 16 x 8 results those are used whose segments agree. In return a warp
// reads long runs of few rows of W, and with them every lane holds whole units of 64 elements with
// one scale.
//
//   Unit: 64 elements of a row of W, those of the 4 lanes t = 0..3 of a group (lane = 4g + t), 16
//   consecutive ones each. Group g = 4r + s has rows r and r + 2 of 4 (a quad) and segment s of 4
//   units in a run of 256 elements. Within a unit the mma's order of k is the lanes' own order;
//   x is loaded in the same one.
//   A step of a warp: a quad of rows times its share of K, four runs. In run j column pair p of X
//   is segment p ^ j: then the useful results of run j lie in the lanes with t = s ^ j, and each
//   lane has one unit's scale to decode per row instead of all.
//   A thread block: 16 warps = row_groups x k_warps, over a contiguous range of quads; one thread
//   block per SM. Shares of K beyond the 16 warps are taken in rounds.
//
// Codes come through a ring per warp, two steps ahead. The same ring brings x before, once for the whole
// block: 132 processors that ask for the same lines four times wait longer for the L2 cache than for
// the codes. Values are looked up by pairs (PairTable). An unscaled dot product of a unit cannot
// overflow for |x| < 4e35.
//
// What does not depend on the kernel before is done while that one ends: barriers and table; scales and
// the first codes are on their way to the L2 cache.
//
// Sums: a step's lanes write lines to shared memory, every few steps the warp sums the 16 lanes of
// a row, the block sums the k_warps at the end. All in fixed order: the same arguments give the same
// bits, and a second row of X does not change those of the first.
//
// The table holds the values times a scale with which they lose little in 16 bits (table_values.h);
// the blocks' scales are divided by it.
//
// Bytes moved: N * K * (1/2 + scales) + (M * K + M * N) * sizeof(T), x from L2 by every SM. Bound:
// memory; per 1024 weights the shared memory pipe has 16 wavefronts of lookups and about 8 others
// where 32 would keep it busy at 4.2 TB/s, and there are about 2 instructions per weight.
#pragma once

#include <cstdint>

#include "device/async_copy.cuh"
#include "device/decode.cuh"
#include "device/grid_dependency.cuh"
#include "device/mma.cuh"
#include "device/pair_fragment.cuh"
#include "device/pair_table.cuh"
#include "device/shared_memory.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "device/warp_ring.cuh"
#include "device/warp_uniform.cuh"
#include "gemv/heuristics.h"
#include "host/table_values.h"

namespace qlora_native::cuda::gemv_mma_kernels {

constexpr int kWarps = kGemvMmaWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kUnit = 64;
constexpr int kQuad = kGemvMmaQuad;
constexpr int kSpan = 4;  // units of a run
constexpr int kRuns = kGemvMmaRuns;
constexpr int kShareUnits = kRuns * kSpan;  // of a warp
constexpr int kLines = 16;  // of a warp: the lanes' sums for a row of W and one of X
constexpr int kStages = 3;
// The codes of a step, or the warp's share of a row of X.
constexpr int kStageBytes = kQuad * kShareUnits * kUnit / 2;
static_assert(kStageBytes == kShareUnits * kUnit * 2);
using Ring = WarpRing<kStages, kStageBytes>;
// Of a row of W, at most, in a round: what is fetched early where there are several.
constexpr uint32_t kRoundBytes = kWarps * kStageBytes / kQuad;
constexpr uint32_t kMaxScaleBytes = 32768;  // that are fetched early

// Shared memory: the map, the barriers, the partial sums; the table, aligned in the window, with
// the lines in its gaps; the rings.
constexpr uint32_t kWindow = 65536;
constexpr uint32_t kBarriersAt = 1024;
constexpr uint32_t kPartialsAt = kBarriersAt + kWarps * Ring::kBarriersBytes;
static_assert(kPartialsAt + kGemvMmaPartialBytes <= kWindow - 1024, "1 KB is the system's");
constexpr uint32_t kSharedBytes = kWindow + PairTable::kBytes + kWarps * Ring::kBytes;

template <class T>
struct GemvMmaParams {
  const T* x;
  int64_t x_stride;
  const uint8_t* packed;
  BlockScales scales;
  TableValues table;
  const T* bias;
  T* y;
  int64_t y_stride;
  int n;
  int units;  ///< of a row of W
  int rounds;
  int k_warps;
  int k_warps_inverse;  ///< 65536 / k_warps, rounded up
  int row_groups;
  int quads_per_block;
  int blocks_with_more;
};

/// Of `extern __shared__` there is one in a translation unit, whatever the template arguments.
extern __shared__ __align__(256) char shared[];

template <class T, int kM, bool kDoubleQuant>
__device__ __forceinline__ void multiply(const GemvMmaParams<T>& p) {
  constexpr int kLineSteps = kLines / (2 * kM);
  allow_next_kernel();
  const uint32_t shared_base = shared_address(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = uniform(thread / kWarpSize);
  const int g = lane / 4;
  const int t = lane % 4;
  const int r = g / 4;
  const int s = g % 4;
  const int my_run = t ^ s;  // whose results this lane has
  const int row_group = warp * p.k_warps_inverse >> 16;
  const int k_warp = warp - row_group * p.k_warps;
  const uint32_t table_at = kWindow - shared_base % kWindow;
  if (table_at < kPartialsAt + kGemvMmaPartialBytes) __trap();  // the system's part has grown
  const PairTable table(shared_base + table_at, lane);
  const auto ring_of = [&](int owner) {
    return Ring(shared_base + table_at + PairTable::kBytes + owner * Ring::kBytes,
                shared_base + kBarriersAt + owner * Ring::kBarriersBytes);
  };
  Ring ring = ring_of(warp);

  const int block = static_cast<int>(blockIdx.x);
  const int quad_begin = block * p.quads_per_block + min(block, p.blocks_with_more);
  const int quad_end = quad_begin + p.quads_per_block + (block < p.blocks_with_more ? 1 : 0);
  const int first_quad = row_group >= p.row_groups ? quad_end : quad_begin + row_group;
  const uint32_t row_bytes = static_cast<uint32_t>(p.units) * 32;
  const int unit_shift = p.scales.block_shift - 6;

  ring.init();
  if (k_warp == 0 && first_quad < quad_end && elect_lane()) {
    const uint8_t* const codes = p.packed + static_cast<uint64_t>(first_quad) * kQuad * row_bytes;
    const int rows = min(kQuad, p.n - first_quad * kQuad);
    if (p.rounds == 1) {
      prefetch_l2(codes, rows * row_bytes);
    } else {
      for (int i = 0; i < rows; ++i) {
        prefetch_l2(codes + static_cast<uint64_t>(i) * row_bytes, kRoundBytes);
      }
    }
  }
  if (warp == kWarps - 1 && elect_lane()) {
    const auto first = static_cast<uint32_t>(quad_begin * kQuad) * p.units >> unit_shift;
    const auto last = static_cast<uint32_t>(min(quad_end * kQuad, p.n)) * p.units >> unit_shift;
    if constexpr (kDoubleQuant) {
      prefetch_l2(p.scales.codes + first, min(last - first, kMaxScaleBytes));
      prefetch_l2(p.scales.absmax2 + (first >> 8), ((last - first) >> 8) * 4);
    } else {
      prefetch_l2(p.scales.values + first, min((last - first) * 4, kMaxScaleBytes));
    }
    if (p.bias != nullptr) {
      const int first_row = quad_begin * kQuad;
      prefetch_l2(p.bias + first_row, (min(quad_end * kQuad, p.n) - first_row) * sizeof(T));
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
  int unit0 = 0;
  int fill_quad = 0;
  int scale_quad = 0;
  uint32_t scale_unit = 0;
  RawScale raw[2][2] = {};  // of this step and of the next one
  const auto fetch_scales = [&](RawScale(&into)[2]) {
    if (scale_quad >= quad_end) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto row = static_cast<uint32_t>(min(scale_quad * kQuad + half * 2 + r, p.n - 1));
      const uint32_t index = (row * p.units + scale_unit) >> unit_shift;
      if constexpr (kDoubleQuant) {
        into[half] = {load_after_wait(p.scales.absmax2 + (index >> 8)),
                      load_after_wait(p.scales.codes + index)};
      } else {
        into[half] = {load_after_wait(p.scales.values + index), 0};
      }
    }
    scale_quad += p.row_groups;
  };
  const auto fill = [&] {
    if (fill_quad < quad_end) {
      const int bytes = min(kShareUnits, p.units - unit0) * 32;
      const uint8_t* const codes = p.packed + unit0 * 32;
      ring.fill(bytes * kQuad, [&](uint32_t stage, uint32_t barrier) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const auto row = static_cast<uint32_t>(min(fill_quad * kQuad + i, p.n - 1));
          copy_bulk(stage + i * kShareUnits * 32, codes + static_cast<uint64_t>(row) * row_bytes,
                    bytes, barrier);
        }
      });
      fill_quad += p.row_groups;
    }
  };
  // The warp's part of K: x, for all row groups, and the codes of two steps. Of what the memory is asked
  // for, what is needed first is first.
  const auto begin_round = [&](int round) {
    unit0 = (round * p.k_warps + k_warp) * kShareUnits;
    fill_quad = scale_quad = unit0 < p.units ? first_quad : quad_end;
    scale_unit = static_cast<uint32_t>(min(unit0 + my_run * kSpan + s, p.units - 1));
    fetch_scales(raw[0]);
    if (row_group == 0 && unit0 < p.units) {
      const int bytes = min(kShareUnits, p.units - unit0) * 128;
#pragma unroll
      for (int token = 0; token < kM; ++token) {
        ring.fill(bytes, [&](uint32_t stage, uint32_t barrier) {
          copy_bulk(stage, p.x + token * p.x_stride + unit0 * kUnit, bytes, barrier);
        });
      }
    }
    fill();
    fetch_scales(raw[1]);
    // A second row of X has taken the place of the second step's codes.
    if (kM == 1 || row_group != 0) fill();
  };
  begin_round(0);

  uint4 x[kRuns][2];  // of the lane's column, 16 elements of a run
  const auto load_x = [&](int token, uint32_t stage) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int unit = run * kSpan + (g / 2 ^ run);
      const uint32_t from = stage + unit * 128 + t * 32;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (token == 0) x[run][half] = make_uint4(0, 0, 0, 0);
        load_shared_if(x[run][half], from + half * 16, token == g % 2 && unit0 + unit < p.units);
      }
    }
  };
#pragma unroll
  for (int token = 0; token < kM; ++token) load_x(token, ring_of(k_warp).peek(token));
  const int rows = (quad_end - quad_begin) * kQuad;
  __syncthreads();  // all row groups have read x
  if (row_group == 0) {
#pragma unroll
    for (int token = 0; token < kM; ++token) ring.acquire();
    if (kM == 2) fill();
  }

  const uint32_t lines = shared_base + table_at + warp * kLines * PairTable::kStride + 128;
  // partials[k_warp][token][row of the block]
  const uint32_t partials = shared_base + kPartialsAt + k_warp * kM * rows * 4;

  // Sums the 16 lanes of a row in each of the lines: lane l has row l % 2 of line l / 2.
  const auto reduce_lines = [&](int quad, bool accumulates) {
    __syncwarp();
    const int line = lane / 2;
    const uint32_t from = lines + line * PairTable::kStride + lane % 2 * 64;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) sum += load_shared(from + (i + line) % 16 * 4);
    const int step = line / (2 * kM);
    const int part = line % (2 * kM);
    const int row_quad = quad + step * p.row_groups;
    if (row_quad < quad_end) {
      const int row = (row_quad - quad_begin) * kQuad + part / kM * 2 + lane % 2;
      const uint32_t at = partials + (part % kM * rows + row) * 4;
      if (accumulates) sum += load_shared(at);
      store_shared(at, sum);
    }
    __syncwarp();
  };

  for (int round = 0; round < p.rounds; ++round) {
    if (round > 0) {  // of a single row group
      begin_round(round);
      if (first_quad >= quad_end || unit0 >= p.units) break;
#pragma unroll
      for (int token = 0; token < kM; ++token) load_x(token, ring.acquire());
      __syncwarp();
      if (kM == 2) fill();
    }
    int quad = first_quad;
    int lines_quad = quad;
    int line = 0;
    for (; quad < quad_end;) {
      float scale[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kDoubleQuant) {
          scale[half] = decode_scale(load_shared(shared_base + raw[0][half].code * 4),
                                     raw[0][half].value, offset);
        } else {
          scale[half] = raw[0][half].value;
        }
        scale[half] *= p.table.scale_inverse;
      }
      const uint32_t stage = ring.acquire() + r * (kShareUnits * 32) + s * 32 + t * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) raw[0][half] = raw[1][half];
      fetch_scales(raw[1]);
      fill();
      float dot[4];
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const uint2 low_codes = load_shared2(stage + run * kSpan * 32);
        const uint2 high_codes = load_shared2(stage + 2 * kShareUnits * 32 + run * kSpan * 32);
        float sum[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t a[4];
          look_up_fragment(table, low_codes, high_codes, j, a);
          const uint4 v = x[run][j / 2];
          mma_m16n8k16<T>(sum, a, j % 2 == 0 ? v.x : v.z, j % 2 == 0 ? v.y : v.w, sum);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (run == 0 || my_run == run) dot[i] = sum[i];
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int token = 0; token < kM; ++token) {
          store_shared(lines + (line + half * kM + token) * PairTable::kStride + lane * 4,
                       dot[half * 2 + token] * scale[half]);
        }
      }
      line += 2 * kM;
      quad += p.row_groups;
      if (line == kLineSteps * 2 * kM || quad >= quad_end) {
        reduce_lines(lines_quad, round > 0);
        lines_quad = quad;
        line = 0;
      }
      __syncwarp();  // the stage has been read
    }
  }
  __syncthreads();
  for (int i = thread; i < rows * kM; i += kThreads) {
    const int token = kM == 1 ? 0 : i / rows;
    const int row = i - token * rows;
    float sum = 0.0f;
#pragma unroll 4
    for (int w = 0; w < p.k_warps; ++w) {
      sum += load_shared(shared_base + kPartialsAt + (w * kM * rows + i) * 4);
    }
    const int col = quad_begin * kQuad + row;
    if (col < p.n) {
      if (p.bias != nullptr) sum += to_float(load_after_wait(p.bias + col));
      p.y[token * p.y_stride + col] = from_float<T>(sum);
    }
  }
}

}  // namespace qlora_native::cuda::gemv_mma_kernels
