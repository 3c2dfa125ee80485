// Products of groups on the tensor cores of sm_80 and newer, in both directions, from the codes:
//   forward     Y[M,N]  = X[M,K]  * W[e][N,K]^T + bias[e]    cols = N, depth = K
//   transposed  dX[M,K] = dY[M,N] * W[e][N,K]                cols = K, depth = N
//
// One launch for all groups. A thread block walks over tiles of the output: GroupTiles finds them from
// the ends of the groups on the device, GroupedMmaShape says how large they are, MmaTile multiplies.
//
// The depth of a tile is walked in one order: the same arguments give the same bits.
#include <cstdint>

#include "device/async_copy.cuh"
#include "gemm/mma_tile.cuh"
#include "grouped/group_tiles.cuh"
#include "grouped/plan.h"
#include "grouped/stack.cuh"
#include "host/device_info.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/mma_args.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

template <class T>
struct GroupedMmaParams {
  MmaProduct<T> product;
  StackOnDevice stack;
  GroupEndsOnDevice ends;
  const T* bias;  ///< [groups, cols] or null
  int64_t bias_stride;
  int64_t column_tiles;
};

/// Writes zeros to a tile: its rows are of no group.
template <class T, class Shape>
__device__ __forceinline__ void clear(const MmaProduct<T>& product, const MmaTilePlace& place) {
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kRows * Shape::kCols;
       i += Shape::kThreads) {
    const int64_t row = place.row0 + i / Shape::kCols;
    const int col = place.col0 + i % Shape::kCols;
    if (row < place.end_row && col < product.cols) {
      product.out[row * product.out_stride + col] = from_float<T>(0.0f);
    }
  }
}

template <class T, class Shape, bool kTransposed, bool kDoubleQuant>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grouped_kernel(const __grid_constant__ GroupedMmaParams<T> p) {
  using Tile = MmaTile<T, Shape, kTransposed, kDoubleQuant>;
  extern __shared__ __align__(128) char shared[];
  Tile multiplier(p.product, shared);
  const int steps = p.product.steps();
  GroupTiles search(p.ends, Shape::kRows, p.column_tiles);
  GroupTile tile;
  for (int64_t number = blockIdx.x; search.find(number, &tile); number += gridDim.x) {
    MmaTilePlace place{tile.row0, tile.end_row, static_cast<int>(tile.column_tile) * Shape::kCols,
                       p.stack.packed};
    if (tile.group >= p.ends.groups) {
      clear<T, Shape>(p.product, place);
      continue;
    }
    place.packed = p.stack.packed_of(tile.group);
    const BlockScales scales = p.stack.template scales_of<kDoubleQuant>(tile.group);
    typename Tile::Sums sums = {};
    multiplier.add(place, scales, 0, steps, sums);
    multiplier.write_out(place, p.bias == nullptr ? nullptr : p.bias + tile.group * p.bias_stride,
                         sums);
  }
  copy_async_wait<0>();
}

template <class T, class Shape, bool kTransposed, bool kDoubleQuant>
void launch_tiles(const char* name, int device, int64_t grid, const GroupedMmaParams<T>& params,
                  cudaStream_t stream) {
  const auto kernel = grouped_kernel<T, Shape, kTransposed, kDoubleQuant>;
  static OncePerDevice once;
  once(device, [&] { allow_shared_memory(kernel, Shape::kSharedBytes); });
  launch(name, kernel,
         {.grid = grid, .block = Shape::kThreads, .dynamic_shared_bytes = Shape::kSharedBytes},
         stream, params);
}

template <bool kTransposed>
void launch_grouped(const char* name, const MatrixView& activations, const GroupEnds& ends,
                    const QuantizedStackView& stack, const MatrixView& bias,
                    const MutableMatrixView& out, Stream stream) {
  const QuantizedView& first = stack.first;
  const int device = first.device.index;
  const DeviceGuard guard(device);
  const GroupedPlan plan =
      plan_grouped_mma({out.rows, out.cols, stack.count, processor_count(first.device)});
  visit_16bit_dtype(out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GroupedMmaParams<T> params{.product = mma_product<T>(activations, first, out),
                                     .stack = stack_on_device(stack),
                                     .ends = ends_on_device(ends, out.rows),
                                     .bias = static_cast<const T*>(bias.data),
                                     .bias_stride = bias.row_stride,
                                     .column_tiles = plan.column_tiles};
    visit_bool(first.absmax.is_double_quantized(), [&](auto double_quant) {
      constexpr bool kDoubleQuant = decltype(double_quant)::value;
      const auto run = [&](auto launch_fn) {
        launch_fn(name, device, plan.grid, params, to_cuda(stream));
      };
      if (plan.tile_rows == 16) {
        run(launch_tiles<T, GroupedMmaShape<16>, kTransposed, kDoubleQuant>);
      } else if (plan.tile_rows == 64) {
        run(launch_tiles<T, GroupedMmaShape<64>, kTransposed, kDoubleQuant>);
      } else {
        run(launch_tiles<T, GroupedMmaShape<128>, kTransposed, kDoubleQuant>);
      }
    });
  });
}

bool supports(const MatrixView& activations, const QuantizedStackView& stack,
              std::string* why_not) {
  if (!suits_tensor_cores(activations, stack.first, why_not)) return false;
  if (stack.first.rows == 0) {
    *why_not = "W has no rows";
    return false;
  }
  if (stack.packed_stride % 16 != 0) {
    *why_not = "the codes of a matrix are not aligned to 16 bytes";
    return false;
  }
  return true;
}

}  // namespace

bool supports_grouped_mma(const GroupedMatmulArgs& args, std::string* why_not) {
  return supports(args.x, args.weights, why_not);
}

bool supports_grouped_transposed_mma(const GroupedMatmulTransposedArgs& args,
                                     std::string* why_not) {
  return supports(args.dy, args.weights, why_not);
}

void grouped_matmul_mma(const GroupedMatmulArgs& args, Workspace, Stream stream) {
  launch_grouped<false>("grouped_matmul_4bit mma", args.x, args.ends, args.weights, args.bias,
                        args.y, stream);
}

void grouped_matmul_transposed_mma(const GroupedMatmulTransposedArgs& args, Workspace,
                                   Stream stream) {
  launch_grouped<true>("grouped_matmul_4bit_transposed mma", args.dy, args.ends, args.weights, {},
                       args.dx, stream);
}

}  // namespace qlora_native::cuda
