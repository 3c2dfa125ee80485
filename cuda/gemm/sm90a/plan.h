// How a product on Hopper's tensor cores (sm90a/kernel.cuh) is cut. Pure host arithmetic: no CUDA header.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// out[rows, cols] = activations[rows, depth] * weight on `processors` processors: forward has cols = N and
/// depth = K, transposed has cols = K and depth = N.
struct GemmSm90aProblem {
  int64_t rows;
  int64_t cols;
  int64_t depth;
  int64_t processors;
};

inline constexpr int kGemmSm90aTileCols = 128;
inline constexpr int kGemmSm90aChunk = 256;
inline constexpr int kGemmSm90aOwners = 8;  ///< warps that hold the sums of a tile

/// Passed to the kernel as it is. A tile is 128 columns of out by `tile_rows` of its rows, and takes `chunks` chunks
/// of depth. Thread blocks have even shares of all chunks, one tile's after another's, if possible the same part of every
/// tile: where a share ends inside of a tile, the next thread blocks give their sums to the one that began it.
struct GemmSm90aPlan {
  int tile_rows;  ///< 16, 32, 64, 128 or 256
  int col_tiles;
  int row_tiles;
  int row_group;         ///< tiles above each other that come in turn: they use the same weights
  int chunks;            ///< of a tile, of 256 elements of depth
  int grid;              ///< thread blocks: as many as processors, or fewer
  int share;             ///< chunks of a thread block
  int blocks_with_more;  ///< the first blocks have one more

  /// The first chunk of thread block `block`, of those of all tiles.
  constexpr int first_chunk_of(int block) const {
    return block * share + (block < blocks_with_more ? block : blocks_with_more);
  }
  /// What thread blocks give each other their sums by: flags, then sums.
  constexpr int64_t flag_bytes() const { return int64_t{grid} * kGemmSm90aOwners * 8; }
  constexpr int64_t workspace_bytes() const {
    return flag_bytes() + int64_t{grid} * tile_rows * kGemmSm90aTileCols * 4;
  }
};

/// Needs fewer than 2^30 chunks in all tiles.
GemmSm90aPlan plan_gemm_sm90a(const GemmSm90aProblem& problem);

/// Whether a forward product beats the library's other kernels: fewer rows are for those with less to do before the
/// first product.
bool gemm_sm90a_is_preferred(int64_t rows, int64_t depth);

/// Whether a forward product, and a transposed one, beats decoding the weight and a dense product (bench/NOTES.md).
bool gemm_sm90a_beats_dense(int64_t rows);
bool gemm_transposed_sm90a_beats_dense(int64_t rows);

}  // namespace qlora_native::cuda
