// Products of groups on the tensor cores of sm_80 and newer, in both directions, from the codes:
//   forward     Y[M,N]  = X[M,K]  * W[e][N,K]^T + bias[e]    cols = N, depth = K
//   transposed  dX[M,K] = dY[M,N] * W[e][N,K]                cols = K, depth = N
//
// One launch for all groups. A thread block walks over tiles of the output (GroupTiles finds them
// from the ends of the groups on the device; GroupedMmaShape says how large they are) and goes along
// the depth in steps of 64:
//
//   - Activations and codes of later steps are on their way to rings in shared memory (cp.async).
//   - Two threads share a unit, 64 weights of a row with one scale, and decode half of it each, by a
//     table of the sixteen products with the scale, rounded to the 16-bit type: the weights are
//     those of dequantize_4bit. They go to one of two tiles while the other is multiplied.
//   - Each warp multiplies a part of the tile, m16n8k16, adding in fp32. One barrier a step.
//
// The weights' tile consists of slab rows of 64 weights that are neighbours in memory: a slab row is
// a row of W in the forward direction; in the transposed one, 64 of them are the rows of W of the step
// in 64 columns. What differs is how a warp reads it: transposed in the other direction (ldmatrix).
//
// In shared memory 16-byte chunks of rows of 128 bytes are permuted (`chunk_at`), so that eight rows
// of a chunk, or two halves of four rows, lie in different banks.
//
// The depth is walked in one order: the same arguments give the same bits.
#include <algorithm>
#include <cstdint>

#include "device/async_copy.cuh"
#include "device/decode.cuh"
#include "device/mma.cuh"
#include "device/scaled_table.cuh"
#include "device/shared_memory.cuh"
#include "device/vec_load.cuh"
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

constexpr int kUnit = 64;       // weights with one scale, and the depth of a step
constexpr int kUnitBytes = 32;  // of codes
constexpr int kRowBytes = 128;  // of a step of activations, of a slab row
constexpr int kChunkElems = 8;  // 16 bytes
constexpr int kColumnWarps = 4;

template <class T>
struct GroupedMmaParams {
  const T* activations;  ///< [rows, depth]
  int64_t activations_stride;
  StackOnDevice stack;
  GroupEndsOnDevice ends;
  float values[16];
  const T* bias;  ///< [groups, cols] or null
  int64_t bias_stride;
  T* out;  ///< [rows, cols]
  int64_t out_stride;
  bool pairs_are_aligned;  ///< two elements of out at even columns are one access
  int cols;
  int depth;
  int weight_rows;   ///< N
  int units_in_row;  ///< K / 64
  int64_t column_tiles;
};

/// Where chunk `chunk` of row `row` is, in bytes from a tile's first.
__device__ __forceinline__ int chunk_at(int row, int chunk, int permutation) {
  return row * kRowBytes + ((chunk ^ permutation) * 16);
}

template <class T, int kTileRows, bool kTransposed, bool kDoubleQuant>
class Multiplier {
 public:
  static constexpr GroupedMmaShape kShape = kGroupedMmaShape<kTileRows>;
  static constexpr int kTileCols = kShape.tile_cols;
  static constexpr int kThreads = kShape.threads();
  static constexpr int kStages = kShape.stages;
  static constexpr int kRowWarps = kThreads / kWarpSize / kColumnWarps;
  static constexpr int kWarpRows = kTileRows / kRowWarps;
  static constexpr int kWarpCols = kTileCols / kColumnWarps;
  static constexpr int kSlabs = kTileCols / kUnit;  // units of columns, transposed
  static_assert(kRowWarps * kColumnWarps * kWarpSize == kThreads);
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 16 == 0);

  __device__ __forceinline__ Multiplier(const GroupedMmaParams<T>& p, char* shared)
      : p_(p),
        activations_(shared_address(shared)),
        codes_(activations_ + kStages * kShape.activation_bytes()),
        weights_(codes_ + kStages * kShape.code_bytes()),
        map_(reinterpret_cast<float*>(shared + kShape.shared_bytes() - 1024)),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % kWarpSize),
        warp_row_(thread_ / kWarpSize / kColumnWarps * kWarpRows),
        warp_col_(thread_ / kWarpSize % kColumnWarps * kWarpCols) {
    if constexpr (kDoubleQuant) {
      for (int i = thread_; i < 256; i += kThreads) map_[i] = kDynamicMapOnDevice.values[i];
    }
  }

  __device__ __forceinline__ void run(const GroupTile& tile) {
    col0_ = static_cast<int>(tile.column_tile) * kTileCols;
    source_ = p_.activations + tile.row0 * p_.activations_stride;
    rows_ = static_cast<int>(tile.end_row - tile.row0 < kTileRows ? tile.end_row - tile.row0
                                                                  : kTileRows);
    matrix_ = p_.stack.packed_of(tile.group);
    const BlockScales scales = p_.stack.template scales_of<kDoubleQuant>(tile.group);
    const ScaleReader<kDoubleQuant> reader(scales);
    const int steps = (p_.depth + kUnit - 1) / kUnit;

    __syncthreads();  // the previous tile is done with shared memory; the map is filled
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) fetch(step, steps);
    RawScale raw = reader.load(static_cast<uint64_t>(unit_of(0)) * kUnit);
    RawScale next = reader.load(static_cast<uint64_t>(unit_of(1)) * kUnit);
    copy_async_wait<kStages - 2>();
    decode(0, reader.decode(raw, map_));

    float sums[kWarpRows / 16][kWarpCols / 8][4] = {};
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kStages - 3>();  // activations of this step, codes of the next
      __syncthreads();
      fetch(step + kStages - 1, steps);
      raw = next;
      next = reader.load(static_cast<uint64_t>(unit_of(step + 2)) * kUnit);
      if (step + 1 < steps) decode(step + 1, reader.decode(raw, map_));
      multiply(step, sums);
    }
    store(tile, sums);
  }

  /// Zeros, for rows of no group.
  __device__ __forceinline__ void clear(const GroupTile& tile) {
    const int col0 = static_cast<int>(tile.column_tile) * kTileCols;
    for (int i = thread_; i < kTileRows * kTileCols; i += kThreads) {
      const int64_t row = tile.row0 + i / kTileCols;
      const int col = col0 + i % kTileCols;
      if (row < tile.end_row && col < p_.cols)
        p_.out[row * p_.out_stride + col] = from_float<T>(0.0f);
    }
  }

 private:
  /// The unit of the matrix, of which this thread has a half, in a step. Beyond the matrix it is the
  /// last in its place: what is computed from it is not stored or, along the depth, is multiplied by
  /// zeros and spoils nothing that the last row does not spoil.
  __device__ __forceinline__ int unit_of(int step) const {
    const int unit = thread_ / 2;
    if constexpr (kTransposed) {
      const int row = min(step * kUnit + unit / kSlabs, p_.weight_rows - 1);
      return row * p_.units_in_row + min(col0_ / kUnit + unit % kSlabs, p_.units_in_row - 1);
    } else {
      return min(col0_ + unit, p_.weight_rows - 1) * p_.units_in_row +
             min(step, p_.units_in_row - 1);
    }
  }

  /// The slab row that this thread has a half of.
  __device__ __forceinline__ int slab_row() const {
    const int unit = thread_ / 2;
    return kTransposed ? unit % kSlabs * kUnit + unit / kSlabs : unit;
  }

  /// Transposed, the threads of a quarter of a warp write to two slabs.
  __device__ static __forceinline__ int slab_permutation(int slab_row) {
    return kTransposed ? slab_row % 8 ^ slab_row / kUnit * 2 : slab_row % 8;
  }

  /// Starts the copies of a step, if there is one, and closes their group.
  __device__ __forceinline__ void fetch(int step, int steps) {
    if (step < steps) {
      const int slot = step % kStages;
      copy_async_16(codes_ + slot * kShape.code_bytes() + thread_ * 16,
                    matrix_ + static_cast<int64_t>(unit_of(step)) * kUnitBytes + thread_ % 2 * 16);
      const uint32_t stage = activations_ + slot * kShape.activation_bytes();
      const int chunk = thread_ % 8;
      const int elem = step * kUnit + chunk * kChunkElems;
      const int elems = min(max(p_.depth - elem, 0), kChunkElems);
#pragma unroll
      for (int i = 0; i < kTileRows * 8 / kThreads; ++i) {
        const int row = thread_ / 8 + i * (kThreads / 8);
        const int bytes = row < rows_ ? elems * static_cast<int>(sizeof(T)) : 0;
        const T* const source = bytes > 0 ? source_ + row * p_.activations_stride + elem : source_;
        copy_async_up_to_16(stage + chunk_at(row, chunk, row % 8), source, bytes);
      }
    }
    copy_async_commit();
  }

  /// This thread's 32 weights of a step, from the codes that it has fetched itself.
  __device__ __forceinline__ void decode(int step, float scale) {
    const uint4 codes = load_shared4(codes_ + step % kStages * kShape.code_bytes() + thread_ * 16);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    const ScaledTable table = ScaledTable::make<T>(p_.values, scale);
    const int row = slab_row();
    const uint32_t tile = weights_ + step % 2 * kShape.weight_bytes();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_shared(tile + chunk_at(row, thread_ % 2 * 4 + i, slab_permutation(row)),
                   table.decode(words[i]));
    }
  }

  __device__ __forceinline__ void multiply(int step,
                                           float (&sums)[kWarpRows / 16][kWarpCols / 8][4]) {
    const uint32_t stage = activations_ + step % kStages * kShape.activation_bytes();
    const uint32_t tile = weights_ + step % 2 * kShape.weight_bytes();
#pragma unroll
    for (int k = 0; k < kUnit / 16; ++k) {
      uint32_t a[kWarpRows / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
        const int row = warp_row_ + i * 16 + lane_ % 16;
        load_matrix_x4(stage + chunk_at(row, k * 2 + lane_ / 16, row % 8), a[i]);
      }
#pragma unroll
      for (int j = 0; j < kWarpCols / 16; ++j) {
        uint32_t b[4];  // columns 0..7 of sixteen, then 8..15
        const int col = warp_col_ + j * 16;
        if constexpr (kTransposed) {
          const int at = col + lane_ / 16 * 8;
          const int row = at / kUnit * kUnit + k * 16 + lane_ % 16;
          load_matrix_x4_transposed(
              tile + chunk_at(row, at % kUnit / kChunkElems, slab_permutation(row)), b);
        } else {
          const int row = col + lane_ % 8 + lane_ / 16 * 8;
          load_matrix_x4(tile + chunk_at(row, k * 2 + lane_ / 8 % 2, slab_permutation(row)), b);
        }
#pragma unroll
        for (int i = 0; i < kWarpRows / 16; ++i) {
          mma_m16n8k16<T>(sums[i][2 * j], a[i], b[0], b[1], sums[i][2 * j]);
          mma_m16n8k16<T>(sums[i][2 * j + 1], a[i], b[2], b[3], sums[i][2 * j + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(const GroupTile& tile,
                                        const float (&sums)[kWarpRows / 16][kWarpCols / 8][4]) {
    const T* const bias = p_.bias == nullptr ? nullptr : p_.bias + tile.group * p_.bias_stride;
#pragma unroll
    for (int j = 0; j < kWarpCols / 8; ++j) {
      const int col = col0_ + warp_col_ + j * 8 + lane_ % 4 * 2;
      if (col >= p_.cols) continue;
      const bool has_second = col + 1 < p_.cols;
      const float first_bias = bias == nullptr ? 0.0f : to_float(bias[col]);
      const float second_bias = bias == nullptr || !has_second ? 0.0f : to_float(bias[col + 1]);
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row_ + i * 16 + half * 8 + lane_ / 4;
          if (row >= rows_) continue;
          T* const out = p_.out + (tile.row0 + row) * p_.out_stride + col;
          const float first = sums[i][j][half * 2] + first_bias;
          const float second = sums[i][j][half * 2 + 1] + second_bias;
          if (has_second && p_.pairs_are_aligned) {
            *reinterpret_cast<uint32_t*>(out) = pack_pair<T>(first, second);
          } else {
            out[0] = from_float<T>(first);
            if (has_second) out[1] = from_float<T>(second);
          }
        }
      }
    }
  }

  const GroupedMmaParams<T>& p_;
  uint32_t activations_;  ///< ring of kStages tiles
  uint32_t codes_;        ///< ring of kStages times 16 bytes for each thread
  uint32_t weights_;      ///< two tiles
  float* map_;
  int thread_;
  int lane_;
  int warp_row_;
  int warp_col_;
  // Of the current tile.
  int col0_ = 0;
  int rows_ = 0;
  const T* source_ = nullptr;
  const uint8_t* matrix_ = nullptr;
};

template <class T, int kTileRows, bool kTransposed, bool kDoubleQuant>
__global__ void __launch_bounds__(kGroupedMmaShape<kTileRows>.threads(),
                                  kGroupedMmaShape<kTileRows>.blocks_per_processor)
    grouped_kernel(const __grid_constant__ GroupedMmaParams<T> p) {
  extern __shared__ __align__(128) char shared[];
  Multiplier<T, kTileRows, kTransposed, kDoubleQuant> multiplier(p, shared);
  GroupTiles search(p.ends, kTileRows, p.column_tiles);
  GroupTile tile;
  for (int64_t number = blockIdx.x; search.find(number, &tile); number += gridDim.x) {
    if (tile.group < p.ends.groups) {
      multiplier.run(tile);
    } else {
      multiplier.clear(tile);
    }
  }
  copy_async_wait<0>();
}

template <class T, int kTileRows, bool kTransposed, bool kDoubleQuant>
void launch_tiles(const char* name, int device, int64_t grid, const GroupedMmaParams<T>& params,
                  cudaStream_t stream) {
  constexpr GroupedMmaShape kShape = kGroupedMmaShape<kTileRows>;
  const auto kernel = grouped_kernel<T, kTileRows, kTransposed, kDoubleQuant>;
  static OncePerDevice once;
  once(device, [&] { allow_shared_memory(kernel, kShape.shared_bytes()); });
  launch(name, kernel,
         {.grid = grid,
          .block = kShape.threads(),
          .dynamic_shared_bytes = static_cast<size_t>(kShape.shared_bytes())},
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
    GroupedMmaParams<T> params{
        .activations = static_cast<const T*>(activations.data),
        .activations_stride = activations.row_stride,
        .stack = stack_on_device(stack),
        .ends = ends_on_device(ends, out.rows),
        .values = {},
        .bias = static_cast<const T*>(bias.data),
        .bias_stride = bias.row_stride,
        .out = static_cast<T*>(out.data),
        .out_stride = out.row_stride,
        .pairs_are_aligned = is_aligned(out.data, 4) && out.row_stride % 2 == 0,
        .cols = static_cast<int>(out.cols),
        .depth = static_cast<int>(activations.cols),
        .weight_rows = static_cast<int>(first.rows),
        .units_in_row = static_cast<int>(first.cols / kUnit),
        .column_tiles = plan.column_tiles};
    std::copy_n(first.codebook.values, 16, params.values);
    visit_bool(first.absmax.is_double_quantized(), [&](auto double_quant) {
      constexpr bool kDoubleQuant = decltype(double_quant)::value;
      const auto run = [&](auto launch_fn) {
        launch_fn(name, device, plan.grid, params, to_cuda(stream));
      };
      if (plan.tile_rows == 16) {
        run(launch_tiles<T, 16, kTransposed, kDoubleQuant>);
      } else if (plan.tile_rows == 64) {
        run(launch_tiles<T, 64, kTransposed, kDoubleQuant>);
      } else {
        run(launch_tiles<T, 128, kTransposed, kDoubleQuant>);
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
