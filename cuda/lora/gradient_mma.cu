// grad[r, C] = scaling * s[M, r]^T * D(v)[M, C], or its transpose, on tensor cores (mma.sync, sm_80 and
// newer): 16-bit, fp32 accumulation.
//
// Thread block of 4 warps: up to 64 rows (of r) by 64 columns of grad; every warp multiplies units of
// 16 rows of v, of which a cluster's warps take turns. Each warp copies its units to a ring of its own
// in shared memory, rows of v beside those of s, and reads both transposed from there (ldmatrix).
// Dropout zeroes elements of the copy, 8 neighbours a lane with one block of Philox. The warps' sums are
// added through shared memory in the order of thread blocks and warps: deterministic.
//
// Bytes moved: v once for every 64 of r; s once for every 64 columns, from the L2 cache. Bound: memory.
#include <cstdint>

#include "device/async_copy.cuh"
#include "device/grid_dependency.cuh"
#include "device/mma.cuh"
#include "device/shared_memory.cuh"
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
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kUnitRows = 16;  // the depth of a product
constexpr int kCols = 64;
constexpr int kColTiles = kCols / 8;
constexpr int kMaxCluster = 8;
constexpr int64_t kWantedBlocks = 264;  // two for each processor of the largest devices

/// Bytes of a row of `elems` 16-bit elements. The 16 bytes behind them spread rows over the banks.
constexpr int row_bytes(int elems) { return elems * 2 + 16; }

template <int kRankTiles>
struct Layout {
  static constexpr int kRank = kRankTiles * 16;
  static constexpr int kVRowBytes = row_bytes(kCols);
  static constexpr int kSRowBytes = row_bytes(kRank);
  static constexpr int kSAt = kUnitRows * kVRowBytes;
  static constexpr int kStageBytes = kSAt + kUnitRows * kSRowBytes;
  static constexpr int kStages = kRankTiles == 4 ? 5 : 6;  // within the 99 KB of small devices
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kPitch = kCols + 4;  // floats
  static constexpr int kPartBytes = kRank * kPitch * 4;
  // The sums take the rings' place.
  static constexpr int kSharedBytes = kWarps * (kRingBytes > kPartBytes ? kRingBytes : kPartBytes);
};

template <class T, class G>
struct GradientParams {
  const T* s;
  int64_t s_stride;
  const T* v;
  int64_t v_stride;
  G* grad;
  int64_t grad_row_stride, grad_col_stride;
  int64_t rows, cols;  // of v
  int rank;            // columns of s, a multiple of eight
  int64_t col_tiles;
  int cluster;
  DropoutMask mask;
  float scale;
};

template <class T, class G, int kRankTiles, bool kDrops>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const __grid_constant__ GradientParams<T, G> p) {
  using L = Layout<kRankTiles>;
  extern __shared__ uint4 dynamic_shared[];
  const uint32_t base = shared_address(dynamic_shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int block_rank = static_cast<int>(blockIdx.x) % p.cluster;
  const int64_t tile = blockIdx.x / p.cluster;
  const int64_t col0 = tile % p.col_tiles * kCols;
  const int rank0 = static_cast<int>(tile / p.col_tiles) * L::kRank;
  const uint32_t ring = base + warp * L::kRingBytes;

  wait_for_previous_kernel();
  const int64_t units = (p.rows + kUnitRows - 1) / kUnitRows;
  const int64_t stride = kWarps * p.cluster;
  int64_t to_copy = block_rank * kWarps + warp;
  const auto copy_next = [&](int stage) {
    if (to_copy < units) {
      const uint32_t target = ring + stage * L::kStageBytes;
#pragma unroll
      for (int i = lane; i < kUnitRows * kCols / 8; i += kWarpSize) {
        const int row = i / (kCols / 8);
        const int piece = i % (kCols / 8);
        const int64_t source_row = to_copy * kUnitRows + row;
        const int64_t col = col0 + piece * 8;
        const bool exists = source_row < p.rows && col < p.cols;
        copy_async_16_or_zeros(target + row * L::kVRowBytes + piece * 16,
                               exists ? p.v + source_row * p.v_stride + col : p.v, exists);
      }
#pragma unroll
      for (int i = lane; i < kUnitRows * L::kRank / 8; i += kWarpSize) {
        const int row = i / (L::kRank / 8);
        const int piece = i % (L::kRank / 8);
        const int64_t source_row = to_copy * kUnitRows + row;
        const int col = rank0 + piece * 8;
        const bool exists = source_row < p.rows && col < p.rank;
        copy_async_16_or_zeros(target + L::kSAt + row * L::kSRowBytes + piece * 16,
                               exists ? p.s + source_row * p.s_stride + col : p.s, exists);
      }
    }
    copy_async_commit();
    to_copy += stride;
  };
#pragma unroll
  for (int stage = 0; stage < L::kStages - 1; ++stage) copy_next(stage);

  // Of the four 8x8 matrices that one instruction reads: this lane's row, and its columns' offset.
  const int matrix_row = lane % 16;
  const int matrix_col = lane / 16 * 8;
  // For the transposed left operand the middle two are the other way round.
  const int left_row = lane / 16 * 8 + lane % 8;
  const int left_col = lane / 8 % 2 * 8;
  float acc[kRankTiles][kColTiles][4] = {};
  int stage = 0;
  for (int64_t unit = block_rank * kWarps + warp; unit < units; unit += stride) {
    copy_async_wait<L::kStages - 2>();
    __syncwarp();
    copy_next((stage + L::kStages - 1) % L::kStages);
    const uint32_t v_rows = ring + stage * L::kStageBytes;
    const uint32_t s_rows = v_rows + L::kSAt;
    if constexpr (kDrops) {
#pragma unroll
      for (int i = lane; i < kUnitRows * kCols / 8; i += kWarpSize) {
        const int row = i / (kCols / 8);
        const int piece = i % (kCols / 8);
        const uint32_t at = v_rows + row * L::kVRowBytes + piece * 16;
        uint4 elems = load_shared4(at);
        drop(elems, p.mask.kept(unit * kUnitRows + row, col0 / 8 + piece));
        store_shared(at, elems);
      }
      __syncwarp();
    }
    uint32_t right[kColTiles / 2][4];
#pragma unroll
    for (int j = 0; j < kColTiles / 2; ++j) {
      load_matrix_x4_transposed(v_rows + matrix_row * L::kVRowBytes + (j * 16 + matrix_col) * 2,
                                right[j]);
    }
#pragma unroll
    for (int i = 0; i < kRankTiles; ++i) {
      uint32_t left[4];
      load_matrix_x4_transposed(s_rows + left_row * L::kSRowBytes + (i * 16 + left_col) * 2, left);
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) {
        mma_m16n8k16<T>(acc[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1],
                        acc[i][j]);
      }
    }
    __syncwarp();  // the stage has been read
    stage = (stage + 1) % L::kStages;
  }
  copy_async_wait<0>();
  __syncthreads();  // the rings are not used any more

  const int g = lane / 4;
  const int q = lane % 4;
#pragma unroll
  for (int i = 0; i < kRankTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = i * 16 + half * 8 + g;
        const uint32_t at = base + warp * L::kPartBytes + (row * L::kPitch + j * 8 + q * 2) * 4;
        store_shared(at, acc[i][j][half * 2]);
        store_shared(at + 4, acc[i][j][half * 2 + 1]);
      }
    }
  }
  sync_blocks(p.cluster);
  constexpr int kFoursPerRow = kCols / 4;
  for (int i = block_rank * kThreads + static_cast<int>(threadIdx.x); i < L::kRank * kFoursPerRow;
       i += kThreads * p.cluster) {
    const int row = i / kFoursPerRow;
    const int col = i % kFoursPerRow * 4;
    if (rank0 + row >= p.rank || col0 + col >= p.cols) continue;
    const float4 sum =
        sum_parts4<kWarps, L::kPartBytes>(base + (row * L::kPitch + col) * 4, p.cluster);
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    G* const target = p.grad + (rank0 + row) * p.grad_row_stride + (col0 + col) * p.grad_col_stride;
#pragma unroll
    for (int j = 0; j < 4; ++j) target[j * p.grad_col_stride] = from_float<G>(values[j] * p.scale);
  }
  if (p.cluster > 1) sync_blocks(p.cluster);  // others may still read this block's sums
}

template <int kRankTiles, class T, class G>
void launch_gradient(int device, GradientParams<T, G> params, cudaStream_t stream) {
  using L = Layout<kRankTiles>;
  const bool has_clusters = is_compiled_for_hopper(device);
  params.col_tiles = ceil_div(params.cols, kCols);
  const int64_t tiles = params.col_tiles * ceil_div(params.rank, L::kRank);
  params.cluster = cluster_for(tiles, ceil_div(params.rows, kUnitRows * kWarps), kWantedBlocks,
                               has_clusters ? kMaxCluster : 1);
  visit_bool(params.mask.drops(), [&](auto drops) {
    const auto kernel = gradient_kernel<T, G, kRankTiles, decltype(drops)::value>;
    static OncePerDevice once;
    once(device, [&] { allow_shared_memory(kernel, L::kSharedBytes); });
    launch("lora_gradient mma", kernel,
           {.grid = tiles * params.cluster,
            .block = kThreads,
            .dynamic_shared_bytes = L::kSharedBytes,
            .cluster = params.cluster,
            .overlaps_previous = has_clusters},
           stream, params);
  });
}

}  // namespace

void lora_gradient_mma(const LoraGradientArgs& args, Workspace, Stream stream) {
  const int device = args.v.device.index;
  const DeviceGuard guard(device);
  const DropoutMask mask = dropout_mask(args.dropout, args.v.cols);
  visit_16bit_dtype(args.v.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto grad_tag) {
      using G = typename decltype(grad_tag)::type;
      const int64_t stride = args.grad.row_stride;
      const GradientParams<T, G> params{.s = static_cast<const T*>(args.s.data),
                                        .s_stride = args.s.row_stride,
                                        .v = static_cast<const T*>(args.v.data),
                                        .v_stride = args.v.row_stride,
                                        .grad = static_cast<G*>(args.grad.data),
                                        .grad_row_stride = args.transposed ? 1 : stride,
                                        .grad_col_stride = args.transposed ? stride : 1,
                                        .rows = args.v.rows,
                                        .cols = args.v.cols,
                                        .rank = static_cast<int>(args.s.cols),
                                        .col_tiles = 0,
                                        .cluster = 1,
                                        .mask = mask,
                                        .scale = args.scaling * mask.scale};
      if (args.s.cols <= 16) {
        launch_gradient<1>(device, params, to_cuda(stream));
      } else if (args.s.cols <= 32) {
        launch_gradient<2>(device, params, to_cuda(stream));
      } else {
        launch_gradient<4>(device, params, to_cuda(stream));
      }
    };
    if (args.grad.dtype == args.v.dtype) {
      run(tag);
    } else {
      run(TypeTag<float>{});
    }
  });
}

}  // namespace qlora_native::cuda
