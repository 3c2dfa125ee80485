// From the sums of a warpgroup, as wgmma leaves them, to the rows of a product on Hopper.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device/pair_table.cuh"
#include "device/shared_memory.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"

namespace qlora_native::cuda::sm90a {

constexpr int kWarpgroup = 128;
constexpr int kPanelRows = 64;  ///< columns of the product that a warpgroup has

template <class T>
struct OutMatrix {
  const T* bias;  ///< null or [cols]
  T* data;
  int64_t row_stride;
  int rows;
  int cols;
  bool is_aligned;  ///< rows begin at multiples of 16 bytes
};

/// Tile number `tile` when `row_group` tiles above each other come in turn, then those of the next column, then the
/// next rows: neighbours use the same weights.
struct TilePosition {
  int row;  ///< in tiles
  int col;

  __device__ __forceinline__ static TilePosition of(int tile, int row_group, int row_tiles,
                                                    int col_tiles) {
    const int group_tiles = row_group * col_tiles;
    const int group = tile / group_tiles;
    const int within = tile - group * group_tiles;
    const int first = group * row_group;
    const int rows = min(row_group, row_tiles - first);
    const int col = within / rows;
    return {first + within - col * rows, col};
  }
};

constexpr int kMaxStagedRows = 32;
/// What write_tile() needs of shared memory for a tile of `rows` rows.
constexpr int staging_bytes(int rows) { return std::min(rows, kMaxStagedRows) * kPanelRowBytes; }

/// Adds the bias, rounds and writes 64 columns from `first_col` on and as many rows as there are sums, some at a
/// time, by way of shared memory at `staging`. The warpgroup's threads call it; `barrier` is theirs.
template <class T, int kHalves, int kSumsOfHalf>
__device__ __forceinline__ void write_tile(const OutMatrix<T>& out, int first_row, int first_col,
                                           uint32_t staging, int barrier, int thread,
                                           float (&sums)[kHalves][kSumsOfHalf]) {
  constexpr int kSums = kHalves * kSumsOfHalf;
  constexpr int kTokens = 2 * kSums;
  constexpr int kOutTokens = std::min(kTokens, kMaxStagedRows);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  if (out.bias != nullptr) {
    const int col = first_col + warp * 16 + lane / 4;
    const float low = col < out.cols ? to_float(out.bias[col]) : 0.0f;
    const float high = col + 8 < out.cols ? to_float(out.bias[col + 8]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i / kSumsOfHalf][i % kSumsOfHalf] += i / 2 % 2 == 0 ? low : high;
    }
  }
  // Rows of 64 columns, 128 bytes, swizzled like panels.
  const int own_row =
      lane / 16 * 8 + lane % 8;  // of the four 8x8 matrices that are stored at a time
  const int own_piece = warp * 2 + lane / 8 % 2;
#pragma unroll
  for (int first = 0; first < kTokens; first += kOutTokens) {
    if (first_row + first >= out.rows) break;
#pragma unroll
    for (int i = 0; i < kOutTokens / 16; ++i) {
      const int at = (first / 16 + i) * 8;
      const float* const part = sums[at / kSumsOfHalf] + at % kSumsOfHalf;
      const uint32_t words[4] = {pack_pair<T>(part[0], part[1]), pack_pair<T>(part[2], part[3]),
                                 pack_pair<T>(part[4], part[5]), pack_pair<T>(part[6], part[7])};
      store_matrix_x4_transposed(
          staging + (i * 16 + own_row) * kPanelRowBytes + (own_piece ^ (own_row % 8)) * 16, words);
    }
    sync_some(barrier, kWarpgroup);
    const int piece = thread % 8;
    const int col = first_col + piece * 8;
#pragma unroll 1
    for (int token = thread / 8; token < kOutTokens; token += 16) {
      const int row = first_row + first + token;
      if (row >= out.rows || col >= out.cols) break;
      const uint4 values =
          load_shared4(staging + token * kPanelRowBytes + (piece ^ (token % 8)) * 16);
      T* const target = out.data + row * out.row_stride + col;
      if (out.is_aligned && col + 8 <= out.cols) {
        *reinterpret_cast<uint4*>(target) = values;
      } else {
        const T* const elems = reinterpret_cast<const T*>(&values);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (col + j < out.cols) target[j] = elems[j];
        }
      }
    }
    sync_some(barrier, kWarpgroup);
  }
}

}  // namespace qlora_native::cuda::sm90a
