// Products with a 4-bit matrix as a plain tiled kernel on the CUDA cores: any shape, dtype and
// alignment, fp32 accumulation.
//   forward     Y[M,N]  = X[M,K]  * W[N,K]^T + bias    rows = M, cols = N, depth = K
//   transposed  dX[M,K] = dY[M,N] * W[N,K]             rows = M, cols = K, depth = N
// Both read the same storage: only the direction in which a tile of W is walked differs.
//
// Grid: one thread block of 256 threads per tile of kTileRows x 64 of the output; neighbouring
// thread blocks share the tile of W, so that its codes are read from L2. The threads form 16 x 16;
// thread (ty, tx) owns rows ty * kRowsPerThread.. and columns 4 * tx.. of the tile.
//
// Every 32 steps of the depth, a tile of activations [32][kTileRows] and a tile of decoded weights
// [32][64] are put into shared memory as fp32, depth first. A load unit is 8 elements that are
// neighbours in memory: along the depth for activations and forward weights, along the columns for
// transposed weights. With K a multiple of 8 and aligned codes, a unit of weights is one 4-byte
// load and lies in one quantization block; otherwise it is read element by element.
//
// The depth is walked in one order: the same arguments give the same bits.
//
// Bytes moved: each tile of W once per row tile, each tile of activations once per column tile, all
// but the first from L2. Bound: FP32 arithmetic and shared memory reads (8 floats per 16 FMAs).
#include "gemm/heuristics.h"

#include <cstdint>

#include "device/decode.cuh"
#include "device/vec_load.cuh"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileDepth = 32;
constexpr int kUnit = 8;  // elements per load unit
constexpr int kColsPerThread = 4;
constexpr int kPadding = 4;  // floats after each row of a shared tile; keeps rows 16-byte aligned
static_assert(kThreads == kTileDepth * kGemmTileCols / kUnit, "one unit of weights per thread");
static_assert(kGemmTileCols == 16 * kColsPerThread);

template <class T>
struct GemmParams {
  const T* activations;  ///< [rows, depth]
  int64_t activations_stride;
  const uint8_t* packed;
  BlockScales scales;
  Codebook codebook;
  const T* bias;  ///< [cols] or null
  T* out;         ///< [rows, cols]
  int64_t out_stride;
  int64_t rows, cols, depth;
  int64_t weight_cols;  ///< K
  int64_t row_tiles;
  bool activations_are_aligned;  ///< every row starts at a multiple of 16 bytes
  bool weight_is_aligned;        ///< units of weights are 4-byte aligned
};

/// activations[row, d .. d + 8], zeros outside the array.
template <class T>
__device__ __forceinline__ void load_activations(const GemmParams<T>& p, int64_t row, int64_t d,
                                                 float (&out)[kUnit]) {
  const T* source = p.activations + row * p.activations_stride + d;
  if (row < p.rows && p.activations_are_aligned && d + kUnit <= p.depth) {
    load8<true>(source, out);
  } else {
    load8_partial(source, row < p.rows ? p.depth - d : 0, out);
  }
}

/// The weights of the unit that starts at row n, column k of W, zeros outside W.
template <class T, bool kDoubleQuant>
__device__ __forceinline__ void load_weights(const GemmParams<T>& p, const LookupTable& table,
                                             const ScaleReader<kDoubleQuant>& scales,
                                             bool row_exists, int64_t n, int64_t k,
                                             float (&out)[kUnit]) {
  const int64_t elem = n * p.weight_cols + k;
  if (row_exists && k < p.weight_cols && p.weight_is_aligned) {
    // K is a multiple of 8: the whole unit exists.
    const float absmax = scales.decode(scales.load(elem));
    decode8(table, *reinterpret_cast<const uint32_t*>(p.packed + elem / 2), out);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) out[i] = __fmul_rn(out[i], absmax);
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      out[i] = 0.0f;
      if (row_exists && k + i < p.weight_cols) {
        out[i] =
            __fmul_rn(table[load_code(p.packed, elem + i)], scales.decode(scales.load(elem + i)));
      }
    }
  }
}

template <class T, int kTileRows, bool kTransposed, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads, 3)
    gemm_kernel(const __grid_constant__ GemmParams<T> p) {
  constexpr int kRowsPerThread = kTileRows / 16;
  __shared__ LookupTable table;
  alignas(16) __shared__ float activation_tile[kTileDepth][kTileRows + kPadding];
  alignas(16) __shared__ float weight_tile[kTileDepth][kGemmTileCols + kPadding];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row0 = blockIdx.x % p.row_tiles * kTileRows;
  const int64_t col0 = blockIdx.x / p.row_tiles * kGemmTileCols;
  const int tx = thread % 16;
  const int ty = thread / 16;
  const ScaleReader<kDoubleQuant> scales(p.scales);
  table.fill(p.codebook);

  float sums[kRowsPerThread][kColsPerThread] = {};
  for (int64_t d0 = 0; d0 < p.depth; d0 += kTileDepth) {
    __syncthreads();  // the table is filled, the previous tiles have been read
    // Units along the depth go to neighbouring threads by row (column): conflict-free stores.
    if (thread < kTileRows * kTileDepth / kUnit) {
      const int row = thread % kTileRows;
      const int d = thread / kTileRows * kUnit;
      float unit[kUnit];
      load_activations(p, row0 + row, d0 + d, unit);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) activation_tile[d + i][row] = unit[i];
    }
    float unit[kUnit];
    if constexpr (kTransposed) {
      const int d = thread / (kGemmTileCols / kUnit);
      const int col = thread % (kGemmTileCols / kUnit) * kUnit;
      load_weights(p, table, scales, d0 + d < p.depth, d0 + d, col0 + col, unit);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) weight_tile[d][col + i] = unit[i];
    } else {
      const int col = thread % kGemmTileCols;
      const int d = thread / kGemmTileCols * kUnit;
      load_weights(p, table, scales, col0 + col < p.cols, col0 + col, d0 + d, unit);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) weight_tile[d + i][col] = unit[i];
    }
    __syncthreads();
#pragma unroll 8
    for (int d = 0; d < kTileDepth; ++d) {
      const float4 weights = *reinterpret_cast<const float4*>(&weight_tile[d][kColsPerThread * tx]);
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        const float activation = activation_tile[d][ty * kRowsPerThread + r];
        sums[r][0] = fmaf(activation, weights.x, sums[r][0]);
        sums[r][1] = fmaf(activation, weights.y, sums[r][1]);
        sums[r][2] = fmaf(activation, weights.z, sums[r][2]);
        sums[r][3] = fmaf(activation, weights.w, sums[r][3]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int64_t row = row0 + ty * kRowsPerThread + r;
#pragma unroll
    for (int c = 0; c < kColsPerThread; ++c) {
      const int64_t col = col0 + kColsPerThread * tx + c;
      if (row < p.rows && col < p.cols) {
        const float bias = p.bias == nullptr ? 0.0f : to_float(p.bias[col]);
        p.out[row * p.out_stride + col] = from_float<T>(sums[r][c] + bias);
      }
    }
  }
}

template <bool kTransposed>
void launch_gemm(const char* name, const MatrixView& activations, const QuantizedView& weight,
                 const void* bias, const MutableMatrixView& out, Stream stream) {
  const DeviceGuard guard(weight.device.index);
  const int64_t depth = activations.cols;
  const GemmPlan plan = plan_gemm({out.rows, out.cols, depth});
  visit_dtype(out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GemmParams<T> params{
        static_cast<const T*>(activations.data),
        activations.row_stride,
        weight.packed,
        block_scales(weight),
        weight.codebook,
        static_cast<const T*>(bias),
        static_cast<T*>(out.data),
        out.row_stride,
        out.rows,
        out.cols,
        depth,
        weight.cols,
        plan.row_tiles,
        is_aligned(activations.data, 16) && activations.row_stride % kVectorElems<T> == 0,
        is_aligned(weight.packed, 4) && weight.cols % kUnit == 0};
    visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
      visit_bool(plan.tile_rows == 64, [&](auto is_large) {
        constexpr int kTileRows = decltype(is_large)::value ? 64 : 16;
        launch(name, gemm_kernel<T, kTileRows, kTransposed, decltype(double_quant)::value>,
               {plan.grid, kThreads}, to_cuda(stream), params);
      });
    });
  });
}

}  // namespace

void gemm_simt(const MatmulArgs& args, Workspace, Stream stream) {
  launch_gemm<false>("matmul_4bit gemm_simt", args.x, args.weight, args.bias.data, args.y, stream);
}

void gemm_transposed_simt(const MatmulTransposedArgs& args, Workspace, Stream stream) {
  launch_gemm<true>("matmul_4bit_transposed gemm_simt", args.dy, args.weight, nullptr, args.dx,
                    stream);
}

}  // namespace qlora_native::cuda
