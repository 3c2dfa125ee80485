// How the tiled matrix product is cut into thread blocks. Pure host arithmetic: no CUDA header.
#pragma once

#include <cstdint>

#include "host/cluster_occupancy.h"

namespace qlora_native::cuda {

/// out[rows, cols] = sum over `depth` of activations[rows, depth] * weight: forward has cols = N
/// and depth = K, transposed has cols = K and depth = N.
struct GemmProblem {
  int64_t rows;
  int64_t cols;
  int64_t depth;
};

struct GemmPlan {
  int tile_rows;      ///< 16 or 64
  int64_t row_tiles;  ///< thread block b has row tile b % row_tiles, column tile b / row_tiles
  int64_t grid;
};

inline constexpr int kGemmTileCols = 64;

GemmPlan plan_gemm(const GemmProblem& problem);

// ---- gemm_mma: tensor cores, eight rows of x at a time ----

struct GemmMmaProblem {
  int64_t m;  ///< 1 to kGemmMmaTokens
  int64_t n;
  int64_t k;  ///< a multiple of 64, at most kGemmMmaMaxDepth
  ClusterCounts clusters;
};

/// How tiles of 16 rows of the weight are dealt to clusters of thread blocks, and K to a cluster's
/// blocks. Passed to the kernel as it is.
struct GemmMmaPlan {
  int grid;                  ///< thread blocks
  int cluster;               ///< blocks that share their tiles, each with a part of K: 1, 2, 4, 8
  int tiles_per_cluster;     ///< consecutive ones
  int clusters_with_more;    ///< the first clusters have one more
  int pass_tiles;            ///< tiles whose sums fit into shared memory
  int k_steps;               ///< of 256 elements, of a block
  uint32_t k_steps_inverse;  ///< 2^32 / k_steps, rounded up; 0 for one step
  int x_pitch;               ///< bytes from a row of x to the next in shared memory
  int shared_bytes;
};

inline constexpr int kGemmMmaTokens = 8;
inline constexpr int kGemmMmaMaxRows = 64;
inline constexpr int64_t kGemmMmaMaxDepth = 32768;  ///< 8 blocks hold 8 rows of x
inline constexpr int kGemmMmaWarps = 16;
inline constexpr int kGemmMmaTileRows = 16;
inline constexpr int kGemmMmaSharedBytes = 232448;  ///< what a block of sm_90 can have
inline constexpr int kGemmMmaXAt = 164864;          ///< where x begins in it
inline constexpr int kGemmMmaSumGaps = 192;         ///< pieces of 128 bytes for sums

/// step / k_steps, for the steps of a pass.
constexpr int gemm_mma_tile_of(const GemmMmaPlan& plan, int step) {
  if (plan.k_steps == 1) return step;
  return static_cast<int>(static_cast<uint64_t>(step) * plan.k_steps_inverse >> 32);
}

GemmMmaPlan plan_gemm_mma(const GemmMmaProblem& problem);

/// Whether it beats decoding the weight and a dense product (bench/NOTES.md). gemm_sm90a, where it runs, is
/// asked before.
bool gemm_mma_is_preferred(int64_t m);

}  // namespace qlora_native::cuda
