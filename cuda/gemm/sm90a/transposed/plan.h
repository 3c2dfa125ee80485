// How dX = dY * W on Hopper's tensor cores (gemm_transposed_sm90a.cu) is cut. Pure host arithmetic: no CUDA header.
#pragma once

#include <cstdint>

#include "host/cluster_occupancy.h"

namespace qlora_native::cuda {

/// dX[rows, cols] = dY[rows, depth] * W[depth, cols].
struct GemmTransposedProblem {
  int64_t rows;
  int64_t cols;
  int64_t depth;
  ClusterCounts clusters;
};

/// Passed to the kernel as it is. A tile is 128 columns of dX by `tile_rows` of its rows; a cluster of
/// thread blocks works on one tile, each block with a part of the depth (split), or on two neighbours that share the
/// activations.
struct GemmTransposedPlan {
  int tile_rows;  ///< 16, 64, 128 or 256
  int cluster;    ///< thread blocks of a cluster
  bool split;     ///< the blocks of a cluster share a tile
  int clusters;   ///< of the grid: each takes every `clusters`-th work item
  int col_items;  ///< tiles, or pairs of them, in a row of tiles
  int row_tiles;
  int row_group;  ///< tiles above each other that are worked on in turn: they use the same weights
  int items;      ///< col_items * row_tiles
  int steps;  ///< of 64 elements of depth, even; a part of a split tile has an even number of them
};

inline constexpr int kGemmTransposedTileCols = 128;
inline constexpr int kGemmTransposedStep = 64;

GemmTransposedPlan plan_gemm_transposed(const GemmTransposedProblem& problem);

/// Whether it beats decoding the weight and a dense product (bench/NOTES.md). `weight_elems` is cols * depth.
bool gemm_transposed_beats_dense(int64_t rows, int64_t weight_elems);

}  // namespace qlora_native::cuda
