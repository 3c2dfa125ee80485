// Y[M,N] = X[M,K] * W[N,K]^T + bias and dX[M,K] = dY[M,N] * W[N,K] on the tensor cores of sm_80 and newer
// (mma.sync), from the same codes: 16-bit activations, fp32 accumulation.
//
// The plan (sm80/plan.h) gives each thread block a run of the steps of all tiles; MmaTile says how a tile is
// multiplied. Where tiles are cut, the thread blocks leave sums of parts in the workspace, and a second kernel adds those of
// a tile in the order of the depth.
//
// Everything is summed in fixed order: the same arguments give the same bits on the same device.
//
// Bytes moved: codes and scales once for each tile of rows, from L2 but for the first; activations once for each
// tile of columns, from L2; sums of at most two parts of tiles for each thread block, written and read.
// Bound: tensor cores; for 32 rows and fewer decoding (byte permutations) and shared memory.
#include <cstdint>
#include <string>

#include "device/async_copy.cuh"
#include "gemm/mma_tile.cuh"
#include "gemm/sm80/plan.h"
#include "host/device_info.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/mma_args.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

template <class T>
struct GemmSm80Params {
  MmaProduct<T> product;
  const uint8_t* packed;
  BlockScales scales;
  const T* bias;  ///< [cols] or null
  int64_t rows;
  float* parts;
  GemmSm80Plan plan;

  __device__ __forceinline__ MmaTilePlace place_of(int tile) const {
    const int column = tile / plan.row_tiles;
    const int row = tile - column * plan.row_tiles;
    return {int64_t{row} * plan.tile_rows, rows, column * plan.tile_cols, packed};
  }
  __device__ __forceinline__ float* part(int block, bool has_start_of_tile) const {
    return parts +
           int64_t{gemm_sm80_part_of(block, has_start_of_tile)} * plan.part_rows * plan.tile_cols;
  }
};

template <class T, class Shape, bool kTransposed, bool kDoubleQuant>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    gemm_sm80_kernel(const __grid_constant__ GemmSm80Params<T> p) {
  using Tile = MmaTile<T, Shape, kTransposed, kDoubleQuant>;
  extern __shared__ __align__(128) char shared[];
  const auto& plan = p.plan;
  const int block = static_cast<int>(blockIdx.x);
  Tile multiplier(p.product, shared);
  int piece = gemm_sm80_first_piece(plan, block);
  const int end = gemm_sm80_first_piece(plan, block + 1);
  while (piece < end) {
    const int tile = piece / plan.pieces;
    const int first = piece - tile * plan.pieces;
    const int last = min(first + end - piece, plan.pieces);
    const MmaTilePlace place = p.place_of(tile);
    typename Tile::Sums sums = {};
    multiplier.add(place, p.scales, first * plan.piece_steps, last * plan.piece_steps, sums);
    if (last - first == plan.pieces) {
      multiplier.write_out(place, p.bias, sums);
    } else {
      multiplier.write_part(place, p.part(block, first == 0), sums);
    }
    piece += last - first;
  }
  copy_async_wait<0>();
}

constexpr int kAddingThreads = 256;
constexpr int kColsOfThread = 4;

int64_t adding_blocks_of_tile(const GemmSm80Plan& plan) {
  return (plan.part_rows * plan.tile_cols / kColsOfThread + kAddingThreads - 1) / kAddingThreads;
}

/// Adds up the parts of the tiles that were cut: kColsOfThread sums of a row by each thread, a candidate by
/// `blocks_of_tile` thread blocks.
template <class T>
__global__ void __launch_bounds__(kAddingThreads)
    gemm_sm80_add_parts_kernel(const __grid_constant__ GemmSm80Params<T> p, int blocks_of_tile) {
  const auto& plan = p.plan;
  const int candidate = static_cast<int>(blockIdx.x) / blocks_of_tile;
  const int tile = gemm_sm80_cut_candidate(plan, candidate);
  const int first = gemm_sm80_block_of(plan, tile * plan.pieces);
  const int last = gemm_sm80_block_of(plan, tile * plan.pieces + plan.pieces - 1);
  if (first == last) return;  // it has written the tile itself
  const int in_tile = static_cast<int>(blockIdx.x) - candidate * blocks_of_tile;
  const int at = (in_tile * kAddingThreads + static_cast<int>(threadIdx.x)) * kColsOfThread;
  const MmaTilePlace place = p.place_of(tile);
  const int64_t row = place.row0 + at / plan.tile_cols;
  const int col = place.col0 + at % plan.tile_cols;
  if (at >= plan.part_rows * plan.tile_cols || row >= place.end_row || col >= p.product.cols)
    return;

  float4 sum = *reinterpret_cast<const float4*>(p.part(first, true) + at);
  for (int block = first + 1; block <= last; ++block) {
    const float4 part = *reinterpret_cast<const float4*>(p.part(block, false) + at);
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  float sums[kColsOfThread] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < kColsOfThread; ++i) {
    if (p.bias != nullptr && col + i < p.product.cols) sums[i] += to_float(p.bias[col + i]);
  }
  T* const out = p.product.out + row * p.product.out_stride + col;
  if (p.product.pairs_are_aligned && col + kColsOfThread <= p.product.cols) {
    reinterpret_cast<uint32_t*>(out)[0] = pack_pair<T>(sums[0], sums[1]);
    reinterpret_cast<uint32_t*>(out)[1] = pack_pair<T>(sums[2], sums[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kColsOfThread; ++i) {
    if (col + i < p.product.cols) out[i] = from_float<T>(sums[i]);
  }
}

template <class T, class Shape, bool kTransposed, bool kDoubleQuant>
void launch_tiles(const char* name, int device, const GemmSm80Params<T>& params,
                  cudaStream_t stream) {
  const auto kernel = gemm_sm80_kernel<T, Shape, kTransposed, kDoubleQuant>;
  static OncePerDevice once;
  once(device, [&] { allow_shared_memory(kernel, Shape::kSharedBytes); });
  launch(name, kernel,
         {.grid = params.plan.grid,
          .block = Shape::kThreads,
          .dynamic_shared_bytes = Shape::kSharedBytes},
         stream, params);
}

/// Calls `visitor` with the tile's shape.
template <class Visitor>
void visit_shape(GemmSm80Tile tile, const Visitor& visitor) {
  switch (tile) {
    case GemmSm80Tile::k32:
      return visitor(GemmSm80Tile32{});
    case GemmSm80Tile::k64:
      return visitor(GemmSm80Tile64{});
    case GemmSm80Tile::kLone32:
      return visitor(GemmSm80LoneTile32{});
    case GemmSm80Tile::kLone64:
      return visitor(GemmSm80LoneTile64{});
    case GemmSm80Tile::k128:
      return visitor(GemmSm80Tile128{});
    case GemmSm80Tile::kWide:
      return visitor(GemmSm80WideTile{});
  }
}

struct Operands {
  const MatrixView& activations;
  const QuantizedView& weight;
  const VectorView& bias;
  const MutableMatrixView& out;
};

GemmSm80Plan plan_of(const MatrixView& activations, const QuantizedView& weight,
                     const MutableMatrixView& out) {
  return plan_gemm_sm80({out.rows, out.cols, activations.cols, processor_count(weight.device),
                         processor_shared_bytes(weight.device)});
}

template <bool kTransposed>
void run(const char* name, const Operands& args, Workspace workspace, Stream stream) {
  const QuantizedView& weight = args.weight;
  const int device = weight.device.index;
  const DeviceGuard guard(device);
  const GemmSm80Plan plan = plan_of(args.activations, weight, args.out);
  visit_16bit_dtype(args.out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GemmSm80Params<T> params{.product = mma_product<T>(args.activations, weight, args.out),
                                   .packed = weight.packed,
                                   .scales = block_scales(weight),
                                   .bias = static_cast<const T*>(args.bias.data),
                                   .rows = args.out.rows,
                                   .parts = static_cast<float*>(workspace.data),
                                   .plan = plan};
    visit_shape(plan.tile, [&](auto shape) {
      visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
        launch_tiles<T, decltype(shape), kTransposed, decltype(double_quant)::value>(
            name, device, params, to_cuda(stream));
      });
    });
    if (const int candidates = gemm_sm80_cut_candidates(plan); candidates > 0) {
      const int64_t blocks_of_tile = adding_blocks_of_tile(plan);
      launch(name, gemm_sm80_add_parts_kernel<T>,
             {.grid = candidates * blocks_of_tile, .block = kAddingThreads}, to_cuda(stream),
             params, static_cast<int>(blocks_of_tile));
    }
  });
}

bool supports(const MatrixView& activations, const QuantizedView& weight,
              const MutableMatrixView& out, std::string* why_not) {
  constexpr int64_t kMaxExtent = int64_t{1}
                                 << 30;  // tiles, rows and columns are counted by 32 bits
  if (!suits_tensor_cores(activations, weight, why_not)) return false;
  if (activations.cols == 0) {
    *why_not = "there is nothing to sum";
  } else if (out.rows > kMaxExtent || out.cols > kMaxExtent || activations.cols > kMaxExtent ||
             (out.rows / GemmSm80Tile32::kRows + 1) * (out.cols / GemmSm80Tile32::kCols + 1) >
                 kMaxExtent) {
    *why_not = "a product of " + std::to_string(out.rows) + " x " +
               std::to_string(activations.cols) + " x " + std::to_string(out.cols) +
               " has more than 2^30 tiles, rows or columns";
  } else {
    return true;
  }
  return false;
}

bool dense_is_faster(const MatrixView& activations, const QuantizedView& weight) {
  return !gemm_sm80_beats_dense(activations.rows, compute_capability(weight.device));
}

}  // namespace

bool supports_gemm_sm80(const MatmulArgs& args, std::string* why_not) {
  return supports(args.x, args.weight, args.y, why_not);
}

bool supports_gemm_transposed_sm80(const MatmulTransposedArgs& args, std::string* why_not) {
  return supports(args.dy, args.weight, args.dx, why_not);
}

bool dense_beats_gemm_sm80(const MatmulArgs& args) { return dense_is_faster(args.x, args.weight); }

bool dense_beats_gemm_transposed_sm80(const MatmulTransposedArgs& args) {
  return dense_is_faster(args.dy, args.weight);
}

int64_t gemm_sm80_workspace_bytes(const MatmulArgs& args) {
  return plan_of(args.x, args.weight, args.y).workspace_bytes();
}

int64_t gemm_transposed_sm80_workspace_bytes(const MatmulTransposedArgs& args) {
  return plan_of(args.dy, args.weight, args.dx).workspace_bytes();
}

void gemm_sm80(const MatmulArgs& args, Workspace workspace, Stream stream) {
  run<false>("matmul_4bit gemm_sm80", {args.x, args.weight, args.bias, args.y}, workspace, stream);
}

void gemm_transposed_sm80(const MatmulTransposedArgs& args, Workspace workspace, Stream stream) {
  run<true>("matmul_4bit_transposed gemm_sm80", {args.dy, args.weight, {}, args.dx}, workspace,
            stream);
}

}  // namespace qlora_native::cuda
