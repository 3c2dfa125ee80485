// A tile of a product with a 4-bit matrix on the tensor cores of sm_80 and newer (mma.sync), from the codes:
//   forward     Y[M,N]  = X[M,K]  * W[N,K]^T + bias    cols = N, depth = K
//   transposed  dX[M,K] = dY[M,N] * W[N,K]             cols = K, depth = N
//
// A thread block goes along the depth in steps of 64:
//
//   - Activations and codes of later steps are on their way to rings in shared memory (cp.async).
//   - One or two threads decode a unit, 64 weights of a row with one scale, by a table of the sixteen
//     products with the scale, rounded to the 16-bit type: the weights are those of dequantize_4bit.
//     They go to one of two tiles while the other is multiplied.
//   - Each warp multiplies a part of the tile, m16n8k16, in fp32. One barrier a step.
//
// The weights' tile consists of slab rows of 64 weights that are neighbours in memory: a slab row is
// a row of W in the forward direction; in the transposed one, 64 of them are the rows of W of the step
// in 64 columns. What differs is how a warp reads it: transposed in the other direction (ldmatrix).
//
// In shared memory 16-byte chunks of rows of 128 bytes are permuted (`chunk_at`), so that what eight
// threads access at a time lies in different banks. The depth is walked in one order: the same arguments give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device/async_copy.cuh"
#include "device/decode.cuh"
#include "device/mma.cuh"
#include "device/scaled_table.cuh"
#include "device/shared_memory.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "gemm/mma_shape.h"
#include "host/launch.h"
#include "qlora_native/quantized.h"
#include "qlora_native/views.h"

namespace qlora_native::cuda {

/// Part of a kernel's parameters.
template <class T>
struct MmaProduct {
  const T* activations;  ///< [rows, depth], rows 16-byte aligned
  int64_t activations_stride;
  float values[16];  ///< of the codes
  T* out;            ///< [rows, cols]
  int64_t out_stride;
  bool pairs_are_aligned;  ///< two elements of out at even columns are one access
  int cols;
  int depth;
  int weight_rows;   ///< N
  int units_in_row;  ///< K / 64

  /// Of 64 elements of the depth.
  __host__ __device__ int steps() const { return (depth + 63) / 64; }
};

/// For arguments that suit tensor cores (host/mma_args.h).
template <class T>
MmaProduct<T> mma_product(const MatrixView& activations, const QuantizedView& weight,
                          const MutableMatrixView& out) {
  MmaProduct<T> product{.activations = static_cast<const T*>(activations.data),
                        .activations_stride = activations.row_stride,
                        .values = {},
                        .out = static_cast<T*>(out.data),
                        .out_stride = out.row_stride,
                        .pairs_are_aligned = is_aligned(out.data, 4) && out.row_stride % 2 == 0,
                        .cols = static_cast<int>(out.cols),
                        .depth = static_cast<int>(activations.cols),
                        .weight_rows = static_cast<int>(weight.rows),
                        .units_in_row = static_cast<int>(weight.cols / 64)};
  std::copy_n(weight.codebook.values, 16, product.values);
  return product;
}

/// Which tile, of which matrix.
struct MmaTilePlace {
  int64_t row0;
  int64_t end_row;  ///< rows from here on are not the tile's; it may end before
  int col0;
  const uint8_t* packed;
};

template <class T, class Shape, bool kTransposed, bool kDoubleQuant>
class MmaTile {
 public:
  static constexpr int kThreads = Shape::kThreads;

 private:
  static constexpr int kUnit = 64;       // weights with one scale, and the depth of a step
  static constexpr int kUnitBytes = 32;  // of codes
  static constexpr int kRowBytes = 128;  // of a step of activations, of a slab row
  static constexpr int kChunkElems = 8;  // 16 bytes
  static constexpr int kSlices = kUnit / 16;
  static constexpr int kStages = Shape::kStages;
  static constexpr int kTileRows = Shape::kRows;
  static constexpr int kTileCols = Shape::kCols;
  static constexpr int kColumnWarps = 4;
  static constexpr int kRowWarps = kThreads / kWarpSize / kColumnWarps;
  static constexpr int kWarpRows = kTileRows / kRowWarps;
  static constexpr int kWarpCols = kTileCols / kColumnWarps;
  static constexpr int kSlabs = kTileCols / kUnit;  // units of columns, transposed
  static constexpr int kThreadsOfUnit = kThreads / kTileCols;
  static constexpr int kPieces = 2 / kThreadsOfUnit;  // 16 bytes of codes, of a thread
  static constexpr int kWords = 4 * kPieces;          // eight codes each
  static_assert(kRowWarps * kColumnWarps * kWarpSize == kThreads && kThreads % 64 == 0);
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 16 == 0 && kUnit % kWarpCols == 0);
  static_assert(kThreadsOfUnit * kTileCols == kThreads && kPieces * kThreadsOfUnit == 2);
  static_assert(kStages >= 3 && kTileRows * 8 % kThreads == 0);

 public:
  using Sums = float[kWarpRows / 16][kWarpCols / 8][4];

  /// `shared` has Shape::kSharedBytes, aligned to 128. All threads of the block call everything.
  __device__ __forceinline__ MmaTile(const MmaProduct<T>& product, char* shared)
      : p_(product),
        activations_(shared_address(shared)),
        codes_(activations_ + kStages * Shape::kActivationBytes),
        weights_(codes_ + kStages * Shape::kCodeBytes),
        map_(reinterpret_cast<float*>(shared + Shape::kSharedBytes - Shape::kMapBytes)),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % kWarpSize),
        warp_row_(thread_ / kWarpSize / kColumnWarps * kWarpRows),
        warp_col_(thread_ / kWarpSize % kColumnWarps * kWarpCols) {
    if constexpr (kDoubleQuant) {
      for (int i = thread_; i < 256; i += kThreads) map_[i] = kDynamicMapOnDevice.values[i];
    }
  }

  /// Adds steps first to end - 1 of the depth, at least one, to `sums`.
  __device__ __forceinline__ void add(const MmaTilePlace& place, const BlockScales& scales,
                                      int first, int end, Sums& sums) {
    const ScaleReader<kDoubleQuant> reader(scales);
    const auto load_scale = [&](int step) {
      return reader.load_unit(static_cast<uint32_t>(unit_at(thread_ / kThreadsOfUnit, step)));
    };
    const auto make_table = [&](RawScale raw) {
      return ScaledTable::make<T>(p_.values, reader.decode(raw, map_));
    };
    col0_ = place.col0;
    source_ = p_.activations + place.row0 * p_.activations_stride;
    rows_ = rows_of(place);
    packed_ = place.packed;

    __syncthreads();  // the previous tile is done with shared memory; the map is filled
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(first + i, end);
    RawScale raw = load_scale(first);
    RawScale next = load_scale(first + 1);
    copy_async_wait<kStages - 2>();
    __syncwarp();  // its lanes have copied the codes of the warp's units for each other
    decode(first, 0, kWords, load_codes(first), make_table(raw));

    for (int step = first; step < end; ++step) {
      copy_async_wait<kStages - 3>();  // activations of this step, codes of the next
      __syncthreads();
      const bool is_last = step + 1 == end;
      if constexpr (Shape::kHasAllRegisters) {
        // The tensor cores get work first, and in between of what takes other pipes.
        if (!is_last) {
          const Codes codes = load_codes(step + 1);
          multiply(step, 0, sums);
          fetch(step + kStages - 1, end);
          const ScaledTable table = make_table(next);
          next = load_scale(step + 2);
#pragma unroll
          for (int slice = 1; slice < kSlices; ++slice) {
            constexpr int kGaps = kSlices - 1;
            decode(step + 1, kWords * (slice - 1) / kGaps, kWords * slice / kGaps, codes, table);
            multiply(step, slice, sums);
          }
          continue;
        }
      } else {
        fetch(step + kStages - 1, end);
        raw = next;
        next = load_scale(step + 2);
        if (!is_last) decode(step + 1, 0, kWords, load_codes(step + 1), make_table(raw));
      }
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) multiply(step, slice, sums);
    }
  }

  /// Rounds the sums, with the bias ([cols], or null) added, and writes them.
  __device__ __forceinline__ void write_out(const MmaTilePlace& place, const T* bias,
                                            const Sums& sums) const {
    const int rows = rows_of(place);
#pragma unroll
    for (int j = 0; j < kWarpCols / 8; ++j) {
      const int col = place.col0 + col_in_tile(j);
      if (col >= p_.cols) continue;
      const bool has_second = col + 1 < p_.cols;
      const float first_bias = bias == nullptr ? 0.0f : to_float(bias[col]);
      const float second_bias = bias == nullptr || !has_second ? 0.0f : to_float(bias[col + 1]);
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row_in_tile(i, half);
          if (row >= rows) continue;
          T* const out = p_.out + (place.row0 + row) * p_.out_stride + col;
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

  /// Writes the sums of the rows that the tile has to part[row][kTileCols].
  __device__ __forceinline__ void write_part(const MmaTilePlace& place, float* part,
                                             const Sums& sums) const {
    const int rows = rows_of(place);
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_in_tile(i, half);
        if (row >= rows) continue;
#pragma unroll
        for (int j = 0; j < kWarpCols / 8; ++j) {
          *reinterpret_cast<float2*>(part + row * kTileCols + col_in_tile(j)) =
              make_float2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
        }
      }
    }
  }

 private:
  struct Codes {
    uint32_t words[kWords];
  };

  __device__ static __forceinline__ int rows_of(const MmaTilePlace& place) {
    const int64_t rows = place.end_row - place.row0;
    return static_cast<int>(rows < kTileRows ? rows : kTileRows);
  }

  /// Where a lane's sums lie, [i][..][half * 2] and [..][j][..]; the second of two is a column further.
  __device__ __forceinline__ int row_in_tile(int i, int half) const {
    return warp_row_ + i * 16 + half * 8 + lane_ / 4;
  }
  __device__ __forceinline__ int col_in_tile(int j) const {
    return warp_col_ + j * 8 + lane_ % 4 * 2;
  }

  /// Where a step's activations and codes are in their rings.
  __device__ static __forceinline__ uint32_t slot_of(int step) {
    return static_cast<uint32_t>(step) % kStages;
  }

  /// Where chunk `chunk` of row `row` is, in bytes from a tile's first.
  __device__ static __forceinline__ int chunk_at(int row, int chunk, int permutation) {
    return row * kRowBytes + ((chunk ^ permutation) * 16);
  }

  /// Where a piece of a unit's codes is, in bytes from a stage's first.
  __device__ static __forceinline__ int piece_at(int unit, int piece) {
    return piece * kTileCols * 16 + (unit ^ piece * 4) * 16;
  }

  /// The number in the matrix of unit 0..kTileCols - 1 of a step. Beyond the matrix it is the last in its
  /// place: what is computed from it is not stored or, along the depth, is multiplied by zeros and
  /// spoils nothing that the last row does not spoil.
  __device__ __forceinline__ int unit_at(int unit, int step) const {
    if constexpr (kTransposed) {
      const int row = min(step * kUnit + unit / kSlabs, p_.weight_rows - 1);
      return row * p_.units_in_row + min(col0_ / kUnit + unit % kSlabs, p_.units_in_row - 1);
    } else {
      return min(col0_ + unit, p_.weight_rows - 1) * p_.units_in_row +
             min(step, p_.units_in_row - 1);
    }
  }

  /// Of the chunks of a slab's row. Transposed, a quarter of a warp writes to several slabs.
  __device__ static __forceinline__ int slab_permutation(int row, int slab) {
    constexpr int kRowsAtATime = std::max(8 / (kThreadsOfUnit * kSlabs), 1);
    return row % 8 ^ slab * kRowsAtATime;
  }

  /// Starts the copies of a step, if it is before `end`, and closes their group. Rows beyond the tile's are its last
  /// one in their place.
  __device__ __forceinline__ void fetch(int step, int end) {
    const bool exists = step < end;
    const uint32_t codes = codes_ + slot_of(step) * Shape::kCodeBytes;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int unit = (thread_ / kWarpSize * kPieces + i) * 16 + lane_ / 2;
      copy_async_16_of_line_if(
          codes + piece_at(unit, lane_ % 2),
          packed_ + static_cast<int64_t>(unit_at(unit, step)) * kUnitBytes + lane_ % 2 * 16,
          exists);
    }
    const int chunk = thread_ % 8;
    const uint32_t own = activations_ + slot_of(step) * Shape::kActivationBytes +
                         chunk_at(thread_ / 8, chunk, thread_ / 8 % 8);
    const int elem = step * kUnit + chunk * kChunkElems;
    const int elems = min(max(p_.depth - elem, 0), kChunkElems);
#pragma unroll
    for (int i = 0; i < kTileRows * 8 / kThreads; ++i) {
      const int row = thread_ / 8 + i * (kThreads / 8);
      const T* const source = source_ + min(row, rows_ - 1) * p_.activations_stride;
      const uint32_t target = own + i * (kThreads / 8) * kRowBytes;
      if constexpr (kTransposed) {
        copy_async_up_to_16_if(target, elems > 0 ? source + elem : source,
                               elems * static_cast<int>(sizeof(T)), exists);
      } else {
        copy_async_16_of_line_if(target, source + elem, exists);
      }
    }
    copy_async_commit();
  }

  /// This thread's codes of a step.
  __device__ __forceinline__ Codes load_codes(int step) const {
    const uint32_t stage = codes_ + slot_of(step) * Shape::kCodeBytes;
    Codes codes;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint4 piece =
          load_shared4(stage + piece_at(thread_ / kThreadsOfUnit, thread_ % kThreadsOfUnit + i));
      codes.words[i * 4] = piece.x;
      codes.words[i * 4 + 1] = piece.y;
      codes.words[i * 4 + 2] = piece.z;
      codes.words[i * 4 + 3] = piece.w;
    }
    return codes;
  }

  /// Decodes some words of this thread's codes of a step.
  __device__ __forceinline__ void decode(int step, int first_word, int end_word, const Codes& codes,
                                         const ScaledTable& table) const {
    const int unit = thread_ / kThreadsOfUnit;
    const int slab = kTransposed ? unit % kSlabs : 0;
    const int row = kTransposed ? unit / kSlabs : unit;
    const int permutation = slab_permutation(row, slab);
    const uint32_t tile = weights_ + step % 2u * Shape::kWeightBytes;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      if (word < first_word || word >= end_word) continue;
      const int chunk = thread_ % kThreadsOfUnit * 4 + word;
      store_shared(tile + chunk_at(slab * kUnit + row, chunk, permutation),
                   table.decode(codes.words[word]));
    }
  }

  /// Adds the products of sixteen of a step's depth.
  __device__ __forceinline__ void multiply(int step, int slice, Sums& sums) const {
    const uint32_t stage = activations_ + slot_of(step) * Shape::kActivationBytes;
    const uint32_t tile = weights_ + step % 2u * Shape::kWeightBytes;
    // Whatever the warp, its first row and column are multiples of sixteen: rows modulo eight are lanes modulo eight.
    const uint32_t own_a =
        stage + chunk_at(warp_row_ + lane_ % 16, slice * 2 + lane_ / 16, lane_ % 8);
    uint32_t a[kWarpRows / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) load_matrix_x4(own_a + i * 16 * kRowBytes, a[i]);
#pragma unroll
    for (int j = 0; j < kWarpCols / 16; ++j) {
      uint32_t b[4];  // columns 0..7 of sixteen, then 8..15
      if constexpr (kTransposed) {
        const int slab = warp_col_ / kUnit;
        const int chunk = warp_col_ % kUnit / kChunkElems + j * 2 + lane_ / 16;
        const uint32_t own_b =
            tile + chunk_at(slab * kUnit + lane_ % 16, chunk, slab_permutation(lane_, slab));
        load_matrix_x4_transposed(own_b + slice * 16 * kRowBytes, b);
      } else {
        const uint32_t own_b = tile + chunk_at(warp_col_ + lane_ % 8 + lane_ / 16 * 8,
                                               slice * 2 + lane_ / 8 % 2, lane_ % 8);
        load_matrix_x4(own_b + j * 16 * kRowBytes, b);
      }
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
        mma_m16n8k16<T>(sums[i][2 * j], a[i], b[0], b[1], sums[i][2 * j]);
        mma_m16n8k16<T>(sums[i][2 * j + 1], a[i], b[2], b[3], sums[i][2 * j + 1]);
      }
    }
  }

  const MmaProduct<T>& p_;
  uint32_t activations_;  ///< ring of kStages tiles
  uint32_t
      codes_;  ///< ring of kStages times a piece's place for all units, then for the second pieces
  uint32_t weights_;  ///< two tiles
  float* map_;
  int thread_;
  int lane_;
  int warp_row_;
  int warp_col_;
  // Of the current tile.
  int col0_ = 0;
  int rows_ = 0;
  const T* source_ = nullptr;
  const uint8_t* packed_ = nullptr;
};

}  // namespace qlora_native::cuda
