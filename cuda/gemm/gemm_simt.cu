// Products with a 4-bit matrix as a plain tiled kernel on the CUDA cores (simt_tile.cuh).
//
// Grid: one thread block per tile of kTileRows x 64 of the output; neighbouring thread blocks share
// the tile of W, so that its codes are read from L2.
//
// Bytes moved: each tile of W once per row tile, each tile of activations once per column tile, all
// but the first from L2. Bound: FP32 arithmetic and shared memory reads (8 floats per 16 FMAs).
#include "gemm/simt_tile.cuh"

#include <cstdint>

#include "gemm/heuristics.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

static_assert(kSimtTileCols == kGemmTileCols);

template <class T>
struct GemmParams {
  SimtProduct<T> product;
  Codebook codebook;
  int64_t row_tiles;
};

template <class T, int kTileRows, bool kTransposed, bool kDoubleQuant>
__global__ void __launch_bounds__(kSimtThreads, 3)
    gemm_kernel(const __grid_constant__ GemmParams<T> p) {
  __shared__ LookupTable table;
  __shared__ SimtTiles<kTileRows> tiles;
  table.fill(p.codebook);
  multiply_simt_tile<T, kTileRows, kTransposed, kDoubleQuant>(
      p.product, table, tiles, blockIdx.x % p.row_tiles * kTileRows,
      blockIdx.x / p.row_tiles * kSimtTileCols);
}

template <bool kTransposed>
void launch_gemm(const char* name, const MatrixView& activations, const QuantizedView& weight,
                 const void* bias, const MutableMatrixView& out, Stream stream) {
  const DeviceGuard guard(weight.device.index);
  const int64_t depth = activations.cols;
  const GemmPlan plan = plan_gemm({out.rows, out.cols, depth});
  visit_dtype(out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const SimtProduct<T> product{
        static_cast<const T*>(activations.data),
        activations.row_stride,
        weight.packed,
        block_scales(weight),
        static_cast<const T*>(bias),
        static_cast<T*>(out.data),
        out.row_stride,
        out.rows,
        out.cols,
        depth,
        weight.cols,
        is_aligned(activations.data, 16) && activations.row_stride % kVectorElems<T> == 0,
        is_aligned(weight.packed, 4) && weight.cols % kSimtUnit == 0};
    const GemmParams<T> params{product, weight.codebook, plan.row_tiles};
    visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
      visit_bool(plan.tile_rows == 64, [&](auto is_large) {
        constexpr int kTileRows = decltype(is_large)::value ? 64 : 16;
        launch(name, gemm_kernel<T, kTileRows, kTransposed, decltype(double_quant)::value>,
               {plan.grid, kSimtThreads}, to_cuda(stream), params);
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
