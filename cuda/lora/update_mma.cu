// y[M, C] += D(scaling * t[M, r] * F^T) on tensor cores (mma.sync, sm_80 and newer): 16-bit, fp32
// accumulation. F [C, r] is the prepared factor, its rows padded to a multiple of 16.
//
// Thread block of 4 warps: 32 rows of y by 512 columns, a warp every fourth tile of 32 columns. The
// rows of t lie in shared memory, padded with zeros; F comes straight to registers. Both are used as
// products of depth 16 in which a lane's 4 neighbours, 8 bytes, are the elements 2q, 2q + 1 and 2q + 8,
// 2q + 9 (q = lane % 4). The four products of a tile are of columns 2 j, 2 j + 1 of every eight, so that
// a lane ends up with 8 neighbours of a row of y, 16 bytes, and one block of Philox is for them.
//
// Bytes moved: y twice; F once for every 32 rows, from the L2 cache. Bound: memory.
#include <cstdint>

#include "device/grid_dependency.cuh"
#include "device/mma.cuh"
#include "device/pair_table.cuh"
#include "device/shared_memory.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "dropout_mask.h"
#include "host/compiled_architecture.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "lora/lora_mma.h"
#include "lora/prepared_factor.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRowTiles = 2;  // of 16 rows
constexpr int kRows = kRowTiles * 16;
constexpr int kTileCols = 32;
constexpr int kProducts = kTileCols / 8;  // of a tile and 16 rows
constexpr int kTilesPerWarp = 4;
constexpr int kBlockCols = kWarps * kTilesPerWarp * kTileCols;
constexpr int kDepth = 16;
constexpr int kPadding = 8;  // elements after a row of t: rows begin in different banks

template <class T>
struct UpdateParams {
  const T* t;
  int64_t t_stride;
  int rank;  // columns of t
  const T* factor;
  int64_t factor_stride;
  int depth;  // of a row of the factor, a multiple of 16
  T* y;
  int64_t y_stride;
  int64_t rows, cols;
  int64_t row_blocks;
  DropoutMask mask;
  float scale;
};

/// A lane's 8 neighbours of each of its rows of a tile of y.
struct LaneRows {
  uint4 rows[kRowTiles][2];
};

template <class T, bool kDrops>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ UpdateParams<T> p) {
  extern __shared__ uint4 dynamic_shared[];
  T* const t_rows = reinterpret_cast<T*>(dynamic_shared);  // [kRows][pitch]
  const int pitch = p.depth + kPadding;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int g = lane / 4;
  const int q = lane % 4;
  const int64_t row0 = blockIdx.x % p.row_blocks * kRows;
  const int64_t block_col = blockIdx.x / p.row_blocks * kBlockCols;

  wait_for_previous_kernel();
  const auto load_y = [&](int64_t col) {
    LaneRows y;
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) {
      const int64_t row = row0 + i * 8 + g;
      y.rows[i / 2][i % 2] = uint4{};
      if (row < p.rows && col < p.cols) {
        y.rows[i / 2][i % 2] =
            load_streaming_after_wait(reinterpret_cast<const uint4*>(p.y + row * p.y_stride + col));
      }
    }
    return y;
  };
  int64_t tile_col = block_col + warp * kTileCols;
  LaneRows next = load_y(tile_col + q * 8);
  for (int i = thread; i < kRows * p.depth; i += kThreads) {
    const int row = i / p.depth;
    const int col = i - row * p.depth;
    const bool exists = row0 + row < p.rows && col < p.rank;
    t_rows[row * pitch + col] =
        exists ? load_after_wait(p.t + (row0 + row) * p.t_stride + col) : T{};
  }
  __syncthreads();

#pragma unroll 1
  for (int tile = 0; tile < kTilesPerWarp && tile_col < p.cols;
       ++tile, tile_col += kWarps * kTileCols) {
    const LaneRows y = next;
    next = load_y(tile + 1 < kTilesPerWarp ? tile_col + kWarps * kTileCols + q * 8 : p.cols);
    float acc[kRowTiles][kProducts][4] = {};
#pragma unroll 2
    for (int depth = 0; depth < p.depth; depth += kDepth) {
      uint2 factor[kProducts];
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
        const int64_t col = tile_col + g / 2 * 8 + j * 2 + g % 2;
        factor[j] = uint2{};
        if (col < p.cols) {
          factor[j] = load_after_wait(
              reinterpret_cast<const uint2*>(p.factor + col * p.factor_stride + depth + q * 4));
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const T* const source = t_rows + (m * 16 + g) * pitch + depth + q * 4;
        const uint2 low = *reinterpret_cast<const uint2*>(source);
        const uint2 high = *reinterpret_cast<const uint2*>(source + 8 * pitch);
        const uint32_t a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
        for (int j = 0; j < kProducts; ++j) {
          mma_m16n8k16<T>(acc[m][j], a, factor[j].x, factor[j].y, acc[m][j]);
        }
      }
    }
    const int64_t col = tile_col + q * 8;
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) {
      const int64_t row = row0 + i * 8 + g;
      if (row >= p.rows || col >= p.cols) continue;
      float values[8];
      unpack<T>(y.rows[i / 2][i % 2], values);
      const uint32_t kept = kDrops ? p.mask.kept(row, col / 8) : kAllKept;
      uint32_t words[kProducts];
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
        const float* const sums = &acc[i / 2][j][i % 2 * 2];
        if ((kept >> (2 * j) & 1u) != 0) values[2 * j] += sums[0] * p.scale;
        if ((kept >> (2 * j + 1) & 1u) != 0) values[2 * j + 1] += sums[1] * p.scale;
        words[j] = pack_pair<T>(values[2 * j], values[2 * j + 1]);
      }
      *reinterpret_cast<uint4*>(p.y + row * p.y_stride + col) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

FactorUse factor_use(const LoraUpdateArgs& args) {
  return {args.factor, args.factor_transposed, args.y.cols,
          ceil_div(args.t.cols, int64_t{kDepth}) * kDepth, args.y.dtype};
}

}  // namespace

int64_t lora_update_mma_workspace_bytes(const LoraUpdateArgs& args) {
  return factor_use(args).workspace_bytes();
}

void lora_update_mma(const LoraUpdateArgs& args, Workspace workspace, Stream stream) {
  const int device = args.y.device.index;
  const DeviceGuard guard(device);
  const MatrixView factor = prepare_factor(factor_use(args), workspace, to_cuda(stream));
  const DropoutMask mask = dropout_mask(args.dropout, args.y.cols);
  const int64_t row_blocks = ceil_div(args.y.rows, kRows);
  visit_16bit_dtype(args.y.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const UpdateParams<T> params{.t = static_cast<const T*>(args.t.data),
                                 .t_stride = args.t.row_stride,
                                 .rank = static_cast<int>(args.t.cols),
                                 .factor = static_cast<const T*>(factor.data),
                                 .factor_stride = factor.row_stride,
                                 .depth = static_cast<int>(factor.cols),
                                 .y = static_cast<T*>(args.y.data),
                                 .y_stride = args.y.row_stride,
                                 .rows = args.y.rows,
                                 .cols = args.y.cols,
                                 .row_blocks = row_blocks,
                                 .mask = mask,
                                 .scale = args.scaling * mask.scale};
    const LaunchShape shape{
        .grid = row_blocks * ceil_div(args.y.cols, kBlockCols),
        .block = kThreads,
        .dynamic_shared_bytes = static_cast<size_t>(kRows * (factor.cols + kPadding)) * sizeof(T),
        .overlaps_previous = is_compiled_for_hopper(device)};
    visit_bool(mask.drops(), [&](auto drops) {
      launch("lora_update mma", update_kernel<T, decltype(drops)::value>, shape, to_cuda(stream),
             params);
    });
  });
}

}  // namespace qlora_native::cuda
