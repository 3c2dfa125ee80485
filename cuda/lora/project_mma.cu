// t[M, r] = scaling * D(x)[M, C] * F^T on tensor cores (mma.sync, sm_80 and newer): 16-bit, fp32
// accumulation. F [r, C] is the prepared factor.
//
// Thread block of 4 warps: 32 rows of x by up to 64 columns of t; every warp multiplies units of 64
// columns of x, of which a cluster's warps take turns. Both operands come straight from global memory
// to registers: what is summed over may be permuted, so a lane takes 8 neighbours, 16 bytes, of a row
// of x and of one of F, and uses words 0..3 as the elements 2q, 2q + 1 and 2q + 8, 2q + 9 (q = lane %
// 4) of two products of depth 16. The warps' sums are added through shared memory in the order of
// thread blocks and warps: deterministic.
//
// Bytes moved: x once; F once per thread block, from the L2 cache. Bound: memory.
#include <cstdint>

#include "device/grid_dependency.cuh"
#include "device/mma.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "dropout_mask.h"
#include "host/compiled_architecture.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "lora/cluster_sums.cuh"
#include "lora/drop.cuh"
#include "lora/lora_mma.h"
#include "lora/prepared_factor.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRowTiles = 2;  // of 16 rows
constexpr int kRows = kRowTiles * 16;
constexpr int kUnit = 64;
constexpr int kHalves = 2;  // of a unit
constexpr int kMaxCluster = 8;
constexpr int64_t kWantedBlocks = 528;  // four for each processor of the largest devices

template <class T>
struct ProjectParams {
  const T* x;
  int64_t x_stride;
  const T* factor;
  int64_t factor_stride;
  int factor_rows;  // a multiple of eight
  T* t;
  int64_t t_stride;
  int64_t rows, cols;
  int rank;  // columns of t
  int64_t row_tiles;
  int cluster;
  DropoutMask mask;
  float scale;
};

template <class T, int kRankTiles, bool kDrops>
__global__ void __launch_bounds__(kThreads)
    project_kernel(const __grid_constant__ ProjectParams<T> p) {
  constexpr int kPitch = kRankTiles * 8 + 4;
  __shared__ alignas(16) float sums[kWarps][kRows][kPitch];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int g = lane / 4;
  const int q = lane % 4;
  const int block_rank = static_cast<int>(blockIdx.x) % p.cluster;
  const int64_t tile = blockIdx.x / p.cluster;
  const int64_t row0 = tile % p.row_tiles * kRows;
  const int t0 = static_cast<int>(tile / p.row_tiles) * kRankTiles * 8;

  wait_for_previous_kernel();
  float acc[kRowTiles][kRankTiles][4] = {};
  const int64_t units = (p.cols + kUnit - 1) / kUnit;
  for (int64_t unit = block_rank * kWarps + warp; unit < units; unit += kWarps * p.cluster) {
    uint4 x[kHalves][kRowTiles][2];
    uint4 factor[kHalves][kRankTiles];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int64_t col = unit * kUnit + half * (kUnit / kHalves) + q * 8;
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
        const int64_t row = row0 + i * 8 + g;
        x[half][i / 2][i % 2] = uint4{};
        if (row < p.rows && col < p.cols) {
          x[half][i / 2][i % 2] = load_streaming_after_wait(
              reinterpret_cast<const uint4*>(p.x + row * p.x_stride + col));
        }
      }
#pragma unroll
      for (int j = 0; j < kRankTiles; ++j) {
        factor[half][j] = uint4{};
        if (t0 + j * 8 < p.factor_rows && col < p.cols) {
          factor[half][j] = load_after_wait(
              reinterpret_cast<const uint4*>(p.factor + (t0 + j * 8 + g) * p.factor_stride + col));
        }
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if constexpr (kDrops) {
        const int64_t col8 = (unit * kUnit + half * (kUnit / kHalves)) / 8 + q;
#pragma unroll
        for (int i = 0; i < kRowTiles * 2; ++i) {
          drop(x[half][i / 2][i % 2], p.mask.kept(row0 + i * 8 + g, col8));
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const uint4 low = x[half][m][0];
        const uint4 high = x[half][m][1];
        const uint32_t first[4] = {low.x, high.x, low.y, high.y};
        const uint32_t second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int j = 0; j < kRankTiles; ++j) {
          const uint4 f = factor[half][j];
          mma_m16n8k16<T>(acc[m][j], first, f.x, f.y, acc[m][j]);
          mma_m16n8k16<T>(acc[m][j], second, f.z, f.w, acc[m][j]);
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int j = 0; j < kRankTiles; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(&sums[warp][m * 16 + half * 8 + g][j * 8 + q * 2]) =
            make_float2(acc[m][j][half * 2], acc[m][j][half * 2 + 1]);
      }
    }
  }
  sync_blocks(p.cluster);
  constexpr int kFoursPerRow = kRankTiles * 2;
  constexpr int kPartBytes = kRows * kPitch * 4;
  for (int i = block_rank * kThreads + static_cast<int>(threadIdx.x); i < kRows * kFoursPerRow;
       i += kThreads * p.cluster) {
    const int row = i / kFoursPerRow;
    const int col = i % kFoursPerRow * 4;
    if (row0 + row >= p.rows || t0 + col >= p.rank) continue;
    const float4 sum =
        sum_parts4<kWarps, kPartBytes>(shared_address(&sums[0][row][col]), p.cluster);
    T* const target = p.t + (row0 + row) * p.t_stride + t0 + col;
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (t0 + col + j < p.rank) target[j] = from_float<T>(values[j] * p.scale);
    }
  }
  if (p.cluster > 1) sync_blocks(p.cluster);  // others may still read this block's sums
}

FactorUse factor_use(const LoraProjectArgs& args) {
  return {args.factor, args.factor_transposed, ceil_div(args.t.cols, int64_t{8}) * 8, args.x.cols,
          args.x.dtype};
}

template <class T, int kRankTiles>
void launch_project(const LoraProjectArgs& args, ProjectParams<T> params, cudaStream_t stream) {
  const int device = args.x.device.index;
  const bool has_clusters = is_compiled_for_hopper(device);
  params.row_tiles = ceil_div(params.rows, kRows);
  const int64_t tiles = params.row_tiles * ceil_div(params.rank, kRankTiles * 8);
  params.cluster = cluster_for(tiles, ceil_div(params.cols, kUnit * kWarps), kWantedBlocks,
                               has_clusters ? kMaxCluster : 1);
  const LaunchShape shape{.grid = tiles * params.cluster,
                          .block = kThreads,
                          .cluster = params.cluster,
                          .overlaps_previous = has_clusters};
  visit_bool(params.mask.drops(), [&](auto drops) {
    launch("lora_project mma", project_kernel<T, kRankTiles, decltype(drops)::value>, shape, stream,
           params);
  });
}

}  // namespace

int64_t lora_project_mma_workspace_bytes(const LoraProjectArgs& args) {
  return factor_use(args).workspace_bytes();
}

void lora_project_mma(const LoraProjectArgs& args, Workspace workspace, Stream stream) {
  const DeviceGuard guard(args.x.device.index);
  const MatrixView factor = prepare_factor(factor_use(args), workspace, to_cuda(stream));
  const DropoutMask mask = dropout_mask(args.dropout, args.x.cols);
  visit_16bit_dtype(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ProjectParams<T> params{.x = static_cast<const T*>(args.x.data),
                                  .x_stride = args.x.row_stride,
                                  .factor = static_cast<const T*>(factor.data),
                                  .factor_stride = factor.row_stride,
                                  .factor_rows = static_cast<int>(factor.rows),
                                  .t = static_cast<T*>(args.t.data),
                                  .t_stride = args.t.row_stride,
                                  .rows = args.x.rows,
                                  .cols = args.x.cols,
                                  .rank = static_cast<int>(args.t.cols),
                                  .row_tiles = 0,
                                  .cluster = 1,
                                  .mask = mask,
                                  .scale = args.scaling * mask.scale};
    if (args.t.cols <= 16) {
      launch_project<T, 2>(args, params, to_cuda(stream));
    } else if (args.t.cols <= 32) {
      launch_project<T, 4>(args, params, to_cuda(stream));
    } else {
      launch_project<T, 8>(args, params, to_cuda(stream));
    }
  });
}

}  // namespace qlora_native::cuda
