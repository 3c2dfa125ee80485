// How the tiled matrix product is cut into thread blocks. Pure host arithmetic: no CUDA header.
#pragma once

#include <cstdint>

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

// ---- gemm_mma: tensor cores, 16 rows of x at a time ----

inline constexpr int kGemmMmaTokens = 16;
inline constexpr int kGemmMmaMaxRows = 64;  ///< in several launches
inline constexpr int kGemmMmaWarps = 16;
inline constexpr int kGemmMmaTileRows = 16;
inline constexpr int kGemmMmaShare = 256;
/// Tiles whose sums a thread block holds at a time.
inline constexpr int kGemmMmaPassTiles = 32;

struct GemmMmaProblem {
  int64_t n;
  int64_t k;  ///< a multiple of 64
  int64_t processors;
};

/// How tiles of 16 rows of the weight and shares of 256 elements of K are dealt to thread blocks and their warps.
/// Passed to the kernel as it is.
///
/// Thread block b has part = b % parts of the tiles and slab = slabs - 1 - b / parts of K: those of slab 0, which wait
/// for the others' sums, come last.
struct GemmMmaPlan {
  int slabs;  ///< of K
  int parts;  ///< of the tiles, consecutive ones
  int tiles_per_part;
  int parts_with_more;  ///< the first parts have one tile more
  int k_warps;          ///< warps with a share of K each
  int row_groups;       ///< tiles, or pairs of them, that a thread block works on at a time

  constexpr int first_tile_of(int part) const {
    return part * tiles_per_part + (part < parts_with_more ? part : parts_with_more);
  }
  /// Most of a part.
  constexpr int passes() const { return tiles_per_part / kGemmMmaPassTiles + 1; }
  /// Columns of the sums that slabs give each other: of whole tiles.
  constexpr int sums_cols() const { return first_tile_of(parts) * kGemmMmaTileRows; }
  /// What thread blocks of one part give each other their sums by: flags, then sums [slabs - 1, m, sums_cols()] for
  /// m rows of x, at most kGemmMmaTokens.
  constexpr int64_t flag_bytes() const {
    const int64_t flags = int64_t{slabs - 1} * parts * passes();
    return (flags + flags % 2) * 8;  // the sums begin at a multiple of 16
  }
  constexpr int64_t workspace_bytes(int64_t m) const {
    return flag_bytes() + (slabs - 1) * m * sums_cols() * 4;
  }
};

GemmMmaPlan plan_gemm_mma(const GemmMmaProblem& problem);

/// Whether it beats decoding the weight and a dense product (bench/NOTES.md). gemm_sm90a, where it runs, is
/// asked before.
bool gemm_mma_is_preferred(int64_t m);

}  // namespace qlora_native::cuda
