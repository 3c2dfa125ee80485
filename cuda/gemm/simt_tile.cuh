// A tile of a product with a 4-bit matrix on the CUDA cores: any shape, dtype and alignment, fp32
// accumulation.
//   forward     Y[M,N]  = X[M,K]  * W[N,K]^T + bias    rows = M, cols = N, depth = K
//   transposed  dX[M,K] = dY[M,N] * W[N,K]             rows = M, cols = K, depth = N
// Both read the same storage: only the direction in which a tile of W is walked differs.
//
// A thread block of 256 threads makes kTileRows x 64 of the output. The threads form 16 x 16;
// thread (ty, tx) owns rows ty * kRowsPerThread.. and columns 4 * tx.. of the tile.
//
// Every 32 steps of the depth, a tile of activations [32][kTileRows] and a tile of decoded weights
// [32][64] are put into shared memory as fp32, depth first. A load unit is 8 elements that are
// neighbours in memory: along the depth for activations and forward weights, along the columns for
// transposed weights. With K a multiple of 8 and aligned codes, a unit of weights is one 4-byte
// load and lies in one quantization block; otherwise it is read element by element.
//
// The depth is walked in one order: the same arguments give the same bits.
#pragma once

#include <cstdint>

#include "device/decode.cuh"
#include "device/vec_load.cuh"

namespace qlora_native::cuda {

inline constexpr int kSimtThreads = 256;
inline constexpr int kSimtTileCols = 64;
inline constexpr int kSimtTileDepth = 32;
inline constexpr int kSimtUnit = 8;  // elements per load unit

inline constexpr int kSimtColsPerThread = 4;
static_assert(kSimtThreads == kSimtTileDepth * kSimtTileCols / kSimtUnit,
              "one unit of weights per thread");
static_assert(kSimtTileCols == 16 * kSimtColsPerThread);

/// Part of a kernel's parameters.
template <class T>
struct SimtProduct {
  const T* activations;  ///< [rows, depth]
  int64_t activations_stride;
  const uint8_t* packed;
  BlockScales scales;
  const T* bias;  ///< [cols] or null
  T* out;         ///< [rows, cols]
  int64_t out_stride;
  int64_t rows, cols, depth;
  int64_t weight_cols;           ///< K
  bool activations_are_aligned;  ///< every row starts at a multiple of 16 bytes
  bool weight_is_aligned;        ///< units of weights are 4-byte aligned
};

/// activations[row, d .. d + 8], zeros outside the array.
template <class T>
__device__ __forceinline__ void load_simt_activations(const SimtProduct<T>& p, int64_t row,
                                                      int64_t d, float (&out)[kSimtUnit]) {
  const T* source = p.activations + row * p.activations_stride + d;
  if (row < p.rows && p.activations_are_aligned && d + kSimtUnit <= p.depth) {
    load8<true>(source, out);
  } else {
    load8_partial(source, row < p.rows ? p.depth - d : 0, out);
  }
}

/// The weights of the unit that starts at row n, column k of W, zeros outside W.
template <class T, bool kDoubleQuant>
__device__ __forceinline__ void load_simt_weights(const SimtProduct<T>& p, const LookupTable& table,
                                                  const ScaleReader<kDoubleQuant>& scales,
                                                  bool row_exists, int64_t n, int64_t k,
                                                  float (&out)[kSimtUnit]) {
  const int64_t elem = n * p.weight_cols + k;
  if (row_exists && k < p.weight_cols && p.weight_is_aligned) {
    // K is a multiple of 8: the whole unit exists.
    const float absmax = scales.decode(scales.load(elem));
    decode8(table, *reinterpret_cast<const uint32_t*>(p.packed + elem / 2), out);
#pragma unroll
    for (int i = 0; i < kSimtUnit; ++i) out[i] = __fmul_rn(out[i], absmax);
  } else {
#pragma unroll
    for (int i = 0; i < kSimtUnit; ++i) {
      out[i] = 0.0f;
      if (row_exists && k + i < p.weight_cols) {
        out[i] =
            __fmul_rn(table[load_code(p.packed, elem + i)], scales.decode(scales.load(elem + i)));
      }
    }
  }
}

/// What a thread block puts into shared memory.
template <int kTileRows>
struct SimtTiles {
  /// Floats after each row of a tile; they keep rows 16-byte aligned.
  static constexpr int kPadding = 4;
  alignas(16) float activations[kSimtTileDepth][kTileRows + kPadding];
  alignas(16) float weights[kSimtTileDepth][kSimtTileCols + kPadding];
};

/// Rows from row0 and columns from col0 on, as far as there are any. The filling of `table` need not
/// have been waited for.
template <class T, int kTileRows, bool kTransposed, bool kDoubleQuant>
__device__ __forceinline__ void multiply_simt_tile(const SimtProduct<T>& p,
                                                   const LookupTable& table,
                                                   SimtTiles<kTileRows>& shared, int64_t row0,
                                                   int64_t col0) {
  constexpr int kRowsPerThread = kTileRows / 16;
  const int thread = static_cast<int>(threadIdx.x);
  const int tx = thread % 16;
  const int ty = thread / 16;
  const ScaleReader<kDoubleQuant> scales(p.scales);

  float sums[kRowsPerThread][kSimtColsPerThread] = {};
  for (int64_t d0 = 0; d0 < p.depth; d0 += kSimtTileDepth) {
    __syncthreads();  // the table is filled, the previous tiles have been read
    // Units along the depth go to neighbouring threads by row (column): conflict-free stores.
    if (thread < kTileRows * kSimtTileDepth / kSimtUnit) {
      const int row = thread % kTileRows;
      const int d = thread / kTileRows * kSimtUnit;
      float unit[kSimtUnit];
      load_simt_activations(p, row0 + row, d0 + d, unit);
#pragma unroll
      for (int i = 0; i < kSimtUnit; ++i) shared.activations[d + i][row] = unit[i];
    }
    float unit[kSimtUnit];
    if constexpr (kTransposed) {
      const int d = thread / (kSimtTileCols / kSimtUnit);
      const int col = thread % (kSimtTileCols / kSimtUnit) * kSimtUnit;
      load_simt_weights(p, table, scales, d0 + d < p.depth, d0 + d, col0 + col, unit);
#pragma unroll
      for (int i = 0; i < kSimtUnit; ++i) shared.weights[d][col + i] = unit[i];
    } else {
      const int col = thread % kSimtTileCols;
      const int d = thread / kSimtTileCols * kSimtUnit;
      load_simt_weights(p, table, scales, col0 + col < p.cols, col0 + col, d0 + d, unit);
#pragma unroll
      for (int i = 0; i < kSimtUnit; ++i) shared.weights[d + i][col] = unit[i];
    }
    __syncthreads();
#pragma unroll 8
    for (int d = 0; d < kSimtTileDepth; ++d) {
      const float4 weights =
          *reinterpret_cast<const float4*>(&shared.weights[d][kSimtColsPerThread * tx]);
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        const float activation = shared.activations[d][ty * kRowsPerThread + r];
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
    for (int c = 0; c < kSimtColsPerThread; ++c) {
      const int64_t col = col0 + kSimtColsPerThread * tx + c;
      if (row < p.rows && col < p.cols) {
        const float bias = p.bias == nullptr ? 0.0f : to_float(p.bias[col]);
        p.out[row * p.out_stride + col] = from_float<T>(sums[r][c] + bias);
      }
    }
  }
}

}  // namespace qlora_native::cuda
