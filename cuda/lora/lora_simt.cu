// The passes of adapters as a plain tiled kernel on the CUDA cores: any shape, rank, dtype and
// stride, fp32 accumulation.
//   lora_project   t [M, r]  = scaling * D(x) * F            rows = M, cols = r, depth = C
//   lora_update    y [M, C] += D(scaling * t * F)            rows = M, cols = C, depth = r
//   lora_gradient  g [r, C]  = scaling * s^T * D(v)          rows = r, cols = C, depth = M
//
// Grid: one thread block of 256 threads per tile of 32 x 32 of the output. Thread (ty, tx) of 32 x 8
// owns row ty and columns 4 * tx.. of the tile. Every 32 steps of the depth, both operands' tiles
// are put into shared memory as fp32, depth first, by units of eight elements that are neighbours in
// memory: threads 0..127 read the left operand, the others the right one. One block of Philox serves
// a unit, or the four elements that a thread adds to y.
//
// The depth is walked in one order: the same arguments give the same bits.
//
// Bytes moved: each operand once for each tile of the other's side. Bound: shared memory reads.
#include <cstdint>

#include "device/vec_load.cuh"
#include "dropout_mask.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;  ///< rows, columns and depth of a tile
constexpr int kUnit = kDropoutUnit;
constexpr int kUnitsPerLine = kTile / kUnit;
constexpr int kColsPerThread = 4;
constexpr int kPadding = 4;  // floats after each row of a shared tile; keeps rows 16-byte aligned
static_assert(2 * kTile * kUnitsPerLine == kThreads, "one unit for each thread");
static_assert(kTile * kTile == kThreads * kColsPerThread);

using Tile = float[kTile][kTile + kPadding];

/// A matrix as it is stored, and how the product walks it.
template <class T>
struct Operand {
  const T* data;
  int64_t rows, cols, stride;
  bool rows_are_depth;  ///< its rows run along the depth, else its columns do
};

template <class T>
Operand<T> operand(const MatrixView& view, bool rows_are_depth) {
  return {static_cast<const T*>(view.data), view.rows, view.cols, view.row_stride, rows_are_depth};
}

/// Puts one unit of an operand into its tile, which begins at `other0` and `depth0`. `Round` is the
/// type of the activations; `mask` null: nothing is dropped.
template <class Round, class T>
__device__ __forceinline__ void load_unit(const Operand<T>& source, const DropoutMask* mask,
                                          int unit, int64_t other0, int64_t depth0, Tile& tile) {
  const int line = unit / kUnitsPerLine;
  const int first = unit % kUnitsPerLine * kUnit;
  const int64_t row = (source.rows_are_depth ? depth0 : other0) + line;
  const int64_t col = (source.rows_are_depth ? other0 : depth0) + first;
  float values[kUnit];
  load8_partial(source.data + row * source.stride + col, row < source.rows ? source.cols - col : 0,
                values);
  const uint32_t kept = mask == nullptr ? kAllKept : mask->kept(row, col / kUnit);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const float value = (kept >> i & 1u) != 0 ? to_float(from_float<Round>(values[i])) : 0.0f;
    (source.rows_are_depth ? tile[line][first + i] : tile[first + i][line]) = value;
  }
}

enum class Site { kLeft, kRight, kOutput };  ///< what the dropout is applied to

template <class Left, class Right, class Out>
struct LoraParams {
  Operand<Left> left;    ///< [rows, depth]
  Operand<Right> right;  ///< [depth, cols]
  Out* out;
  int64_t out_row_stride, out_col_stride;
  int64_t rows, cols, depth;
  int64_t row_tiles;
  DropoutMask mask;
  float scale;  ///< of the sums; that of the dropout is in it
};

template <Site kSite, class Left, class Right, class Out>
__global__ void __launch_bounds__(kThreads)
    lora_kernel(const __grid_constant__ LoraParams<Left, Right, Out> p) {
  alignas(16) __shared__ Tile left_tile;
  alignas(16) __shared__ Tile right_tile;
  const int thread = static_cast<int>(threadIdx.x);
  const int ty = thread / (kTile / kColsPerThread);
  const int tx = thread % (kTile / kColsPerThread) * kColsPerThread;
  const int64_t row0 = blockIdx.x % p.row_tiles * kTile;
  const int64_t col0 = blockIdx.x / p.row_tiles * kTile;
  const DropoutMask* const mask = p.mask.drops() ? &p.mask : nullptr;

  float sums[kColsPerThread] = {};
  for (int64_t depth0 = 0; depth0 < p.depth; depth0 += kTile) {
    __syncthreads();  // the previous tiles have been read
    if (thread < kThreads / 2) {
      load_unit<Left>(p.left, kSite == Site::kLeft ? mask : nullptr, thread, row0, depth0,
                      left_tile);
    } else {
      load_unit<Left>(p.right, kSite == Site::kRight ? mask : nullptr, thread - kThreads / 2, col0,
                      depth0, right_tile);
    }
    __syncthreads();
#pragma unroll 8
    for (int d = 0; d < kTile; ++d) {
      const float left = left_tile[d][ty];
      const float4 right = *reinterpret_cast<const float4*>(&right_tile[d][tx]);
      sums[0] = fmaf(left, right.x, sums[0]);
      sums[1] = fmaf(left, right.y, sums[1]);
      sums[2] = fmaf(left, right.z, sums[2]);
      sums[3] = fmaf(left, right.w, sums[3]);
    }
  }

  const int64_t row = row0 + ty;
  uint32_t kept = kAllKept;
  if (kSite == Site::kOutput && mask != nullptr) {
    kept = mask->kept(row, (col0 + tx) / kUnit) >> (tx % kUnit);
  }
#pragma unroll
  for (int i = 0; i < kColsPerThread; ++i) {
    const int64_t col = col0 + tx + i;
    if (row >= p.rows || col >= p.cols) continue;
    Out* const out = p.out + row * p.out_row_stride + col * p.out_col_stride;
    float value = sums[i] * p.scale;
    if constexpr (kSite == Site::kOutput) {
      value = to_float(*out) + ((kept >> i & 1u) != 0 ? value : 0.0f);
    }
    *out = from_float<Out>(value);
  }
}

template <Site kSite, class Left, class Right, class Out>
void launch_lora(const char* name, Device device, Stream stream,
                 LoraParams<Left, Right, Out> params) {
  const DeviceGuard guard(device.index);
  params.row_tiles = ceil_div(params.rows, kTile);
  params.scale *= params.mask.scale;
  launch(name, lora_kernel<kSite, Left, Right, Out>,
         {params.row_tiles * ceil_div(params.cols, kTile), kThreads}, to_cuda(stream), params);
}

/// Calls `visitor` with the tags of the activations' type and of that of a factor or gradient,
/// which is the same or fp32.
template <class Visitor>
void visit_dtypes(DType activations, DType parameters, const Visitor& visitor) {
  visit_dtype(activations, [&](auto tag) {
    if (parameters == activations) {
      visitor(tag, tag);
    } else {
      visitor(tag, TypeTag<float>{});
    }
  });
}

}  // namespace

void lora_project_simt(const LoraProjectArgs& args, Workspace, Stream stream) {
  visit_dtypes(args.x.dtype, args.factor.dtype, [&](auto type, auto factor_type) {
    using T = typename decltype(type)::type;
    using F = typename decltype(factor_type)::type;
    launch_lora<Site::kLeft, T, F, T>(
        "lora_project simt", args.t.device, stream,
        {operand<T>(args.x, false), operand<F>(args.factor, args.factor_transposed),
         static_cast<T*>(args.t.data), args.t.row_stride, 1, args.t.rows, args.t.cols, args.x.cols,
         0, dropout_mask(args.dropout, args.x.cols), args.scaling});
  });
}

void lora_update_simt(const LoraUpdateArgs& args, Workspace, Stream stream) {
  visit_dtypes(args.y.dtype, args.factor.dtype, [&](auto type, auto factor_type) {
    using T = typename decltype(type)::type;
    using F = typename decltype(factor_type)::type;
    launch_lora<Site::kOutput, T, F, T>(
        "lora_update simt", args.y.device, stream,
        {operand<T>(args.t, false), operand<F>(args.factor, args.factor_transposed),
         static_cast<T*>(args.y.data), args.y.row_stride, 1, args.y.rows, args.y.cols, args.t.cols,
         0, dropout_mask(args.dropout, args.y.cols), args.scaling});
  });
}

void lora_gradient_simt(const LoraGradientArgs& args, Workspace, Stream stream) {
  visit_dtypes(args.v.dtype, args.grad.dtype, [&](auto type, auto grad_type) {
    using T = typename decltype(type)::type;
    using G = typename decltype(grad_type)::type;
    const int64_t stride = args.grad.row_stride;
    launch_lora<Site::kRight, T, T, G>(
        "lora_gradient simt", args.grad.device, stream,
        {operand<T>(args.s, true), operand<T>(args.v, true), static_cast<G*>(args.grad.data),
         args.transposed ? 1 : stride, args.transposed ? stride : 1, args.s.cols, args.v.cols,
         args.v.rows, 0, dropout_mask(args.dropout, args.v.cols), args.scaling});
  });
}

}  // namespace qlora_native::cuda
