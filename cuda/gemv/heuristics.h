// How the GEMV is cut into thread blocks, and when it is chosen. Pure host arithmetic, no CUDA
// header.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

struct GemvProblem {
  int64_t m;  ///< rows of x
  int64_t n;  ///< rows of the weight
  int64_t k;
  int64_t x_elem_bytes;    ///< 2 or 4
  bool packed_is_aligned;  ///< the packed codes start at a multiple of 16 bytes
};

/// What a thread block of the GEMV computes: y[x_rows, warps * weight_rows].
struct GemvPlan {
  bool vectorized;       ///< 16-byte loads of codes; false: the byte-wise kernel for any K
  int x_rows;            ///< 1, 2, 4 or 8 rows of x
  int weight_rows;       ///< rows of the weight per warp
  int64_t grid;          ///< thread blocks, over both tilings
  int64_t weight_tiles;  ///< thread block b: weight tile b % weight_tiles, x tile b / weight_tiles
  int64_t stage_k;       ///< elements of an x row held in shared memory at a time
  int64_t shared_bytes;  ///< of x: every row but the last takes its whole share, the last stage_k
};

/// Warps of a thread block.
inline constexpr int kGemvWarps = 8;
/// Rows of the weight per warp of the vectorized kernel: they share the reading of x.
inline constexpr int kGemvWeightRows = 2;
/// Elements of K that a warp takes at a time: 32 per lane.
inline constexpr int64_t kGemvStep = 1024;
/// Shared memory for x, at most.
inline constexpr int64_t kGemvSharedBytes = 32768;

/// Elements of a row of x that its share of the shared memory holds.
constexpr int64_t gemv_stage_capacity(int64_t x_rows, int64_t x_elem_bytes) {
  return kGemvSharedBytes / (x_rows * x_elem_bytes);
}

GemvPlan plan_gemv(const GemvProblem& problem);

/// Whether the GEMV beats the tiled kernel: it reads the weight once per 8 rows of x.
bool gemv_is_preferred(const GemvProblem& problem);

// ---- gemv_mma: tensor cores, one or two rows of x ----

struct GemvMmaProblem {
  int64_t m;
  int64_t n;
  int64_t k;           ///< a multiple of 64
  int64_t processors;  ///< SMs of the device
};

/// How the rows of the weight are dealt to thread blocks, and a block's rows and K to its warps.
struct GemvMmaPlan {
  int64_t grid;
  int quads_per_block;   ///< groups of 4 rows; consecutive ones
  int blocks_with_more;  ///< the first blocks have one more
  int k_warps;           ///< warps that share a quad: each takes a share of K
  int row_groups;        ///< quads that are worked on at a time
  int rounds;            ///< how often the k_warps go on to the next shares, until K is covered
};

inline constexpr int kGemvMmaMaxRows = 2;
inline constexpr int kGemvMmaWarps = 16;
inline constexpr int kGemvMmaQuad = 4;
/// Shared memory for the sums of the k_warps.
inline constexpr int64_t kGemvMmaPartialBytes = 60 * 1024;

/// Runs of 256 elements of K in a warp's share. The lanes' results of four runs are in different
/// lanes.
inline constexpr int kGemvMmaRuns = 4;

GemvMmaPlan plan_gemv_mma(const GemvMmaProblem& problem);

}  // namespace qlora_native::cuda
