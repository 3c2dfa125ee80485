// How the forward product on Hopper's tensor cores (gemm_sm90a.cu) is cut. Pure host arithmetic: no CUDA header.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// Y[rows, cols] = X[rows, depth] * W[cols, depth]^T on `processors` processors.
struct GemmForwardProblem {
  int64_t rows;
  int64_t cols;
  int64_t depth;
  int64_t processors;
};

/// Passed to the kernel as it is. A tile is 128 columns of Y by `tile_rows` of its rows, and takes `chunks` chunks
/// of depth. Thread blocks have even shares of all chunks, one tile's after another's: where a share ends inside
/// of a tile, the next thread blocks give their sums to the one that began it.
struct GemmForwardPlan {
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
};

inline constexpr int kGemmForwardTileCols = 128;
inline constexpr int kGemmForwardChunk = 256;
inline constexpr int kGemmForwardOwners = 8;  ///< warps that hold the sums of a tile

/// What thread blocks give each other their sums by: flags, then sums.
int64_t gemm_forward_flag_bytes(const GemmForwardPlan& plan);
int64_t gemm_forward_workspace_bytes(const GemmForwardPlan& plan);

/// Needs fewer than 2^30 chunks in all tiles.
GemmForwardPlan plan_gemm_forward(const GemmForwardProblem& problem);

/// Whether it beats the library's other kernels: fewer rows are for those with less to do before the first product.
bool gemm_forward_is_preferred(int64_t rows, int64_t depth);

/// Whether it beats decoding the weight and a dense product (bench/NOTES.md).
bool gemm_forward_beats_dense(int64_t rows);

}  // namespace qlora_native::cuda
