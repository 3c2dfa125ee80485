// Products of groups on the CUDA cores, for all arguments that the tensor-core kernel does not take:
// the tiles of gemm_simt, each with the matrix of its group.
#include <cstdint>

#include "gemm/simt_tile.cuh"
#include "grouped/group_tiles.cuh"
#include "grouped/plan.h"
#include "grouped/stack.cuh"
#include "host/device_info.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

static_assert(kSimtTileCols == kGroupedSimtTileCols);

template <class T>
struct GroupedSimtParams {
  SimtProduct<T> product;  ///< with matrix 0
  Codebook codebook;
  StackOnDevice stack;
  GroupEndsOnDevice ends;
  int64_t bias_stride;
  int64_t column_tiles;
};

template <class T, int kTileRows, bool kTransposed, bool kDoubleQuant>
__global__ void __launch_bounds__(kSimtThreads, kGroupedSimtBlocks)
    grouped_kernel(const __grid_constant__ GroupedSimtParams<T> p) {
  __shared__ LookupTable table;
  __shared__ SimtTiles<kTileRows> tiles;
  table.fill(p.codebook);
  GroupTiles search(p.ends, kTileRows, p.column_tiles);
  GroupTile tile;
  for (int64_t number = blockIdx.x; search.find(number, &tile); number += gridDim.x) {
    SimtProduct<T> product = p.product;
    product.rows = tile.end_row;
    if (tile.group < p.ends.groups) {
      product.packed = p.stack.packed_of(tile.group);
      product.scales = p.stack.template scales_of<kDoubleQuant>(tile.group);
      if (product.bias != nullptr) product.bias += tile.group * p.bias_stride;
    } else {
      product.depth = 0;  // the sums stay zero
      product.bias = nullptr;
    }
    multiply_simt_tile<T, kTileRows, kTransposed, kDoubleQuant>(product, table, tiles, tile.row0,
                                                                tile.column_tile * kSimtTileCols);
  }
}

template <bool kTransposed>
void launch_grouped(const char* name, const MatrixView& activations, const GroupEnds& ends,
                    const QuantizedStackView& stack, const MatrixView& bias,
                    const MutableMatrixView& out, Stream stream) {
  const QuantizedView& first = stack.first;
  const DeviceGuard guard(first.device.index);
  const GroupedPlan plan =
      plan_grouped_simt({out.rows, out.cols, stack.count, processor_count(first.device)});
  visit_dtype(out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GroupedSimtParams<T> params{
        .product = {.activations = static_cast<const T*>(activations.data),
                    .activations_stride = activations.row_stride,
                    .packed = first.packed,
                    .scales = block_scales(first),
                    .bias = static_cast<const T*>(bias.data),
                    .out = static_cast<T*>(out.data),
                    .out_stride = out.row_stride,
                    .rows = out.rows,
                    .cols = out.cols,
                    .depth = activations.cols,
                    .weight_cols = first.cols,
                    .activations_are_aligned = is_aligned(activations.data, 16) &&
                                               activations.row_stride % kVectorElems<T> == 0,
                    .weight_is_aligned = is_aligned(first.packed, 4) &&
                                         stack.packed_stride % 4 == 0 &&
                                         first.cols % kSimtUnit == 0},
        .codebook = first.codebook,
        .stack = stack_on_device(stack),
        .ends = ends_on_device(ends, out.rows),
        .bias_stride = bias.row_stride,
        .column_tiles = plan.column_tiles};
    visit_bool(first.absmax.is_double_quantized(), [&](auto double_quant) {
      visit_bool(plan.tile_rows == 64, [&](auto is_large) {
        constexpr int kTileRows = decltype(is_large)::value ? 64 : 16;
        launch(name, grouped_kernel<T, kTileRows, kTransposed, decltype(double_quant)::value>,
               {plan.grid, kSimtThreads}, to_cuda(stream), params);
      });
    });
  });
}

}  // namespace

void grouped_matmul_simt(const GroupedMatmulArgs& args, Workspace, Stream stream) {
  launch_grouped<false>("grouped_matmul_4bit simt", args.x, args.ends, args.weights, args.bias,
                        args.y, stream);
}

void grouped_matmul_transposed_simt(const GroupedMatmulTransposedArgs& args, Workspace,
                                    Stream stream) {
  launch_grouped<true>("grouped_matmul_4bit_transposed simt", args.dy, args.ends, args.weights, {},
                       args.dx, stream);
}

}  // namespace qlora_native::cuda
