// From the sums of a warpgroup, as wgmma leaves them, to the rows of a product on Hopper.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device/grid_dependency.cuh"
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

/// Which columns of a panel the sums of a lane belong to, those of rows lane / 4 and lane / 4 + 8 of its warp's 16.
enum class PanelOrder {
  kEightApart,  ///< 16 * warp + lane / 4, and 8 further
  kNeighbours,  ///< 32 * (warp / 2) + 4 * (lane / 4) + 2 * (warp % 2), and the next
};

/// Puts a warp's sums of 16 rows of the product, rounded, where they belong in rows of 64 columns, 128 bytes, at
/// `staging`, swizzled like panels.
template <class T, PanelOrder kOrder>
__device__ __forceinline__ void stage_sums(uint32_t staging, int warp, int lane,
                                           const float* sums) {
  if constexpr (kOrder == PanelOrder::kEightApart) {
    const int own_row = lane / 16 * 8 + lane % 8;  // of the four 8x8 matrices
    const int own_piece = warp * 2 + lane / 8 % 2;
    const uint32_t words[4] = {pack_pair<T>(sums[0], sums[1]), pack_pair<T>(sums[2], sums[3]),
                               pack_pair<T>(sums[4], sums[5]), pack_pair<T>(sums[6], sums[7])};
    store_matrix_x4_transposed(
        staging + own_row * kPanelRowBytes + (own_piece ^ (own_row % 8)) * 16, words);
  } else {
    const int piece = warp / 2 * 4 + lane / 8;
    const uint32_t in_piece = lane / 4 % 2 * 8 + warp % 2 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane % 4 * 2 + i % 2;  // and 8 further
      store_shared(staging + (row + i / 2 * 8) * kPanelRowBytes + (piece ^ row) * 16 + in_piece,
                   pack_pair<T>(sums[i / 2 * 4 + i % 2], sums[i / 2 * 4 + i % 2 + 2]));
    }
  }
}

/// Adds the bias, rounds and writes 64 columns from `first_col` on and as many rows as there are sums, some at a
/// time, by way of shared memory at `staging`. The warpgroup's threads call it; `barrier` is theirs.
template <PanelOrder kOrder, class T, int kSums>
__device__ __forceinline__ void write_tile(const OutMatrix<T>& out, int first_row, int first_col,
                                           uint32_t staging, int barrier, int thread,
                                           float (&sums)[kSums]) {
  constexpr int kTokens = 2 * kSums;
  constexpr int kOutTokens = std::min(kTokens, kMaxStagedRows);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  if (out.bias != nullptr) {
    constexpr bool kNear = kOrder == PanelOrder::kNeighbours;
    const int col =
        first_col + (kNear ? warp / 2 * 32 + lane / 4 * 4 + warp % 2 * 2 : warp * 16 + lane / 4);
    const int next = col + (kNear ? 1 : 8);
    const float low = col < out.cols ? to_float(load_after_wait(out.bias + col)) : 0.0f;
    const float high = next < out.cols ? to_float(load_after_wait(out.bias + next)) : 0.0f;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += i / 2 % 2 == 0 ? low : high;
  }
#pragma unroll
  for (int first = 0; first < kTokens; first += kOutTokens) {
    if (first_row + first >= out.rows) break;
#pragma unroll
    for (int i = 0; i < kOutTokens / 16; ++i) {
      stage_sums<T, kOrder>(staging + i * 16 * kPanelRowBytes, warp, lane,
                            sums + (first / 16 + i) * 8);
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
