// How a product on the tensor cores of sm_80 and newer (gemm_sm80.cu) is cut. Pure host arithmetic: no CUDA header.
#pragma once

#include <cstdint>

#include "gemm/mma_shape.h"

namespace qlora_native::cuda {

/// out[rows, cols] = activations[rows, depth] * weight: forward has cols = N and depth = K, transposed has
/// cols = K and depth = N. All are at least 1.
struct GemmSm80Problem {
  int64_t rows;
  int64_t cols;
  int64_t depth;
  int64_t processors;
  int64_t shared_bytes;  ///< of a processor: 164 KB on sm_80, 100 KB on sm_86 and sm_89
};

/// Tiles of the output, by their rows. Of 32 and 64 rows, for two thread blocks of four warps on a processor, and for one of
/// eight, alone there: four warps, one for each scheduler, would wait for every latency. The wide tile needs more shared
/// memory than sm_86 and sm_89 have.
using GemmSm80Tile32 = MmaTileShape<32, 128, 128, 4, 2>;
using GemmSm80Tile64 = MmaTileShape<64, 128, 128, 4, 2>;
using GemmSm80LoneTile32 = MmaTileShape<32, 128, 256, 4, 1>;
using GemmSm80LoneTile64 = MmaTileShape<64, 128, 256, 4, 1>;
using GemmSm80Tile128 = MmaTileShape<128, 128, 256, 3, 1>;
using GemmSm80WideTile = MmaTileShape<128, 256, 256, 3, 1>;

enum class GemmSm80Tile { k32, k64, kLone32, kLone64, k128, kWide };

/// Passed to the kernels as it is. Tiles are numbered down the columns of tiles, so that neighbours use the same
/// weights; the steps of their depth, or whole tiles, are pieces. A thread block has a run of pieces:
/// whole tiles, and parts of one at either end, which a second kernel adds up.
struct GemmSm80Plan {
  GemmSm80Tile tile;
  int tile_rows;
  int tile_cols;
  int row_tiles;
  int tiles;
  int pieces;       ///< of a tile
  int piece_steps;  ///< of 64 elements of depth
  int grid;
  int share;             ///< pieces of a thread block
  int blocks_with_more;  ///< the first blocks have one more
  int part_rows;         ///< of a part of a tile in the workspace, [part_rows, tile_cols] floats

  /// Whether some tiles may belong to several thread blocks.
  constexpr bool cuts_tiles() const { return pieces > 1; }
  /// Two parts of tiles for each thread block.
  constexpr int64_t workspace_bytes() const {
    return cuts_tiles() ? int64_t{2} * grid * part_rows * tile_cols * 4 : 0;
  }
};

/// The first piece of thread block 0..grid.
constexpr int gemm_sm80_first_piece(const GemmSm80Plan& plan, int block) {
  return block * plan.share + (block < plan.blocks_with_more ? block : plan.blocks_with_more);
}

/// Whose a piece is.
constexpr int gemm_sm80_block_of(const GemmSm80Plan& plan, int piece) {
  const int in_larger = plan.blocks_with_more * (plan.share + 1);
  return piece < in_larger ? piece / (plan.share + 1)
                           : plan.blocks_with_more + (piece - in_larger) / plan.share;
}

/// Which of the workspace's parts a thread block writes. Only its first part can lack the start of the tile, only its last
/// one the end.
constexpr int gemm_sm80_part_of(int block, bool has_start_of_tile) {
  return 2 * block + (has_start_of_tile ? 1 : 0);
}

/// How many tiles may be cut: all or, where there are no more thread blocks than tiles, those in which the runs of two thread
/// blocks meet. There a run is a tile or longer, so that no tile has two such places.
constexpr int gemm_sm80_cut_candidates(const GemmSm80Plan& plan) {
  if (!plan.cuts_tiles()) return 0;
  return plan.tiles < plan.grid ? plan.tiles : plan.grid - 1;
}

/// The tile that is candidate 0..gemm_sm80_cut_candidates - 1. Each tile that is cut is one of them, once.
constexpr int gemm_sm80_cut_candidate(const GemmSm80Plan& plan, int candidate) {
  return plan.tiles < plan.grid ? candidate
                                : gemm_sm80_first_piece(plan, candidate + 1) / plan.pieces;
}

GemmSm80Plan plan_gemm_sm80(const GemmSm80Problem& problem);

/// Whether it should beat decoding the weight and a dense product on a device of this compute capability (80 for 8.0).
/// Predicted, not measured (bench/NOTES.md).
bool gemm_sm80_beats_dense(int64_t rows, int compute_capability);

}  // namespace qlora_native::cuda
