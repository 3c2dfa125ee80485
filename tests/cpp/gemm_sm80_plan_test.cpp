// How products on the tensor cores of sm_80 and newer are cut. Host arithmetic: needs no GPU and no CUDA build.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <set>

#include "gemm/sm80/plan.h"

namespace qlora_native::cuda {
namespace {

struct Gpu {
  int64_t processors;
  int64_t shared_bytes;
};
constexpr Gpu kA100{108, 164 * 1024};
constexpr Gpu kRtx4090{128, 100 * 1024};
constexpr Gpu kGpus[] = {kA100, kRtx4090, {132, 228 * 1024}, {1, 100 * 1024}};

GemmSm80Plan plan_sm80_for(const Gpu& gpu, int64_t rows, int64_t cols, int64_t depth) {
  return plan_gemm_sm80({rows, cols, depth, gpu.processors, gpu.shared_bytes});
}

TEST(GemmSm80Plan, GivesEveryStepOfEveryTileToOneBlock) {
  for (const Gpu& gpu : kGpus) {
    for (const int64_t rows : {1, 17, 32, 33, 64, 65, 128, 129, 1000}) {
      for (const int64_t cols : {1, 128, 129, 1024, 4096, 14336}) {
        for (const int64_t depth : {1, 64, 65, 4096, 14336}) {
          SCOPED_TRACE(::testing::Message() << rows << " x " << cols << " x " << depth);
          const GemmSm80Plan plan = plan_sm80_for(gpu, rows, cols, depth);
          EXPECT_EQ(plan.pieces * plan.piece_steps, (depth + 63) / 64);
          EXPECT_GE(int64_t{plan.row_tiles} * plan.tile_rows, rows);
          EXPECT_LT(int64_t{plan.row_tiles - 1} * plan.tile_rows, rows);
          EXPECT_EQ(plan.tiles, plan.row_tiles * ((cols + plan.tile_cols - 1) / plan.tile_cols));
          EXPECT_EQ(plan.part_rows, std::min<int64_t>(rows, plan.tile_rows));
          EXPECT_EQ(gemm_sm80_first_piece(plan, 0), 0);
          EXPECT_EQ(gemm_sm80_first_piece(plan, plan.grid), int64_t{plan.tiles} * plan.pieces);
          EXPECT_LE(plan.grid, 2 * gpu.processors);
          for (int block = 0; block < plan.grid; ++block) {
            const int first = gemm_sm80_first_piece(plan, block);
            const int end = gemm_sm80_first_piece(plan, block + 1);
            ASSERT_LT(first, end) << "block " << block << " has nothing to do";
            ASSERT_EQ(gemm_sm80_block_of(plan, first), block);
            ASSERT_EQ(gemm_sm80_block_of(plan, end - 1), block);
          }
        }
      }
    }
  }
}

TEST(GemmSm80Plan, PartsOfTilesHaveTheirPlacesInTheWorkspace) {
  const GemmSm80Plan plan = plan_sm80_for(kA100, 17, 4096, 4096);
  ASSERT_TRUE(plan.cuts_tiles());
  std::set<int> parts;
  for (int block = 0; block < plan.grid; ++block) {
    int piece = gemm_sm80_first_piece(plan, block);
    const int end = gemm_sm80_first_piece(plan, block + 1);
    while (piece < end) {
      const int begin_of_tile = piece / plan.pieces * plan.pieces;
      const int last = std::min(end, begin_of_tile + plan.pieces);
      const int part = gemm_sm80_part_of(block, piece == begin_of_tile);
      if (last - piece < plan.pieces) {
        EXPECT_TRUE(parts.insert(part).second) << "part " << part << " is written twice";
        EXPECT_LE((int64_t{part} + 1) * plan.part_rows * plan.tile_cols * 4,
                  plan.workspace_bytes());
      }
      piece = last;
    }
  }
  EXPECT_GT(parts.size(), 1);
}

TEST(GemmSm80Plan, EveryTileThatIsCutIsACandidateOnce) {
  bool saw_more_tiles = false;
  bool saw_fewer_tiles = false;
  for (const Gpu& gpu : kGpus) {
    for (const int64_t rows : {17, 33, 65, 300, 1000}) {
      for (const int64_t cols : {129, 1024, 4096, 14336, 28672}) {
        for (const int64_t depth : {512, 4096, 14336}) {
          SCOPED_TRACE(::testing::Message() << rows << " x " << cols << " x " << depth);
          const GemmSm80Plan plan = plan_sm80_for(gpu, rows, cols, depth);
          std::set<int> cut;
          for (int block = 1; block < plan.grid; ++block) {
            const int piece = gemm_sm80_first_piece(plan, block);
            if (piece % plan.pieces != 0) cut.insert(piece / plan.pieces);
          }
          std::multiset<int> candidates;
          for (int i = 0; i < gemm_sm80_cut_candidates(plan); ++i) {
            candidates.insert(gemm_sm80_cut_candidate(plan, i));
          }
          for (const int tile : cut) EXPECT_EQ(candidates.count(tile), 1) << "tile " << tile;
          for (const int tile : candidates) EXPECT_LT(tile, plan.tiles);
          EXPECT_LE(candidates.size(), std::min(plan.tiles, plan.grid));
          (plan.tiles < plan.grid ? saw_fewer_tiles : saw_more_tiles) |= !cut.empty();
        }
      }
    }
  }
  EXPECT_TRUE(saw_more_tiles && saw_fewer_tiles);
}

TEST(GemmSm80Plan, TilesAreCutOnlyWhereProcessorsWouldIdle) {
  const GemmSm80Plan few = plan_sm80_for(kA100, 32, 4096, 4096);
  EXPECT_TRUE(few.cuts_tiles()) << "32 tiles";
  EXPECT_EQ(few.grid, 2 * 108);
  const GemmSm80Plan uneven = plan_sm80_for(kA100, 512, 4096, 4096);
  EXPECT_TRUE(uneven.cuts_tiles()) << "64 tiles of 128 x 256";
  EXPECT_EQ(uneven.grid, 108);
  EXPECT_FALSE(plan_sm80_for(kA100, 512, 27 * 256, 4096).cuts_tiles()) << "one for each processor";
  EXPECT_FALSE(plan_sm80_for(kA100, 64, 64, 512).cuts_tiles()) << "short";
  EXPECT_EQ(plan_sm80_for(kA100, 512, 27 * 256, 4096).workspace_bytes(), 0);
  EXPECT_LE(uneven.workspace_bytes(), 32 << 20);
}

TEST(GemmSm80Plan, TakesTheTileThatSuitsRowsAndSharedMemory) {
  EXPECT_EQ(plan_sm80_for(kA100, 17, 4096, 4096).tile, GemmSm80Tile::k32);
  EXPECT_EQ(plan_sm80_for(kA100, 33, 4096, 4096).tile, GemmSm80Tile::k64);
  EXPECT_EQ(plan_sm80_for(kA100, 65, 4096, 4096).tile, GemmSm80Tile::k128) << "few, cut often";
  EXPECT_EQ(plan_sm80_for(kA100, 512, 4096, 4096).tile, GemmSm80Tile::kWide);
  EXPECT_EQ(plan_sm80_for(kA100, 8192, 128, 4096).tile, GemmSm80Tile::k128)
      << "half would be empty";
  EXPECT_EQ(plan_sm80_for(kRtx4090, 512, 4096, 4096).tile, GemmSm80Tile::k128) << "no room";
}

TEST(GemmSm80Plan, AThreadBlockThatIsAloneOnItsProcessorHasEightWarps) {
  EXPECT_EQ(plan_sm80_for(kRtx4090, 17, 14336, 4096).tile, GemmSm80Tile::kLone32) << "no room";
  EXPECT_EQ(plan_sm80_for(kRtx4090, 33, 14336, 4096).tile, GemmSm80Tile::kLone64) << "no room";
  EXPECT_EQ(plan_sm80_for(kA100, 17, 1024, 4096).tile, GemmSm80Tile::kLone32) << "little to do";
  EXPECT_EQ(plan_sm80_for(kA100, 33, 1024, 4096).tile, GemmSm80Tile::kLone64) << "little to do";
  for (const Gpu& gpu : kGpus) {
    for (const int64_t rows : {1, 32, 33, 64}) {
      for (const int64_t cols : {1, 128, 1024, 4096, 14336, 150000}) {
        for (const int64_t depth : {64, 1024, 4096, 14336}) {
          SCOPED_TRACE(::testing::Message() << rows << " x " << cols << " x " << depth);
          const GemmSm80Plan plan = plan_sm80_for(gpu, rows, cols, depth);
          const bool is_alone =
              plan.tile == GemmSm80Tile::kLone32 || plan.tile == GemmSm80Tile::kLone64;
          EXPECT_EQ(is_alone, plan.grid <= gpu.processors);
        }
      }
    }
  }
}

TEST(GemmSm80Plan, EveryTileFitsWhereItIsTaken) {
  constexpr int kMostOfAda = 99 * 1024;  // of a thread block
  constexpr int kMostOfA100 = 163 * 1024;
  EXPECT_LE(GemmSm80Tile32::kSharedBytes, kMostOfAda);
  EXPECT_LE(GemmSm80Tile64::kSharedBytes, kMostOfAda);
  EXPECT_LE(GemmSm80LoneTile32::kSharedBytes, kMostOfAda);
  EXPECT_LE(GemmSm80LoneTile64::kSharedBytes, kMostOfAda);
  EXPECT_LE(GemmSm80Tile128::kSharedBytes, kMostOfAda);
  EXPECT_LE(GemmSm80WideTile::kSharedBytes, kMostOfA100);
}

TEST(GemmSm80Plan, BeatsDenseOnAmpereAndAdaWhereDecodingOnceDoesNotPay) {
  EXPECT_TRUE(gemm_sm80_beats_dense(512, 80));
  EXPECT_FALSE(gemm_sm80_beats_dense(513, 80));
  EXPECT_TRUE(gemm_sm80_beats_dense(1024, 86));
  EXPECT_FALSE(gemm_sm80_beats_dense(1025, 89));
  EXPECT_FALSE(gemm_sm80_beats_dense(64, 90));
}

}  // namespace
}  // namespace qlora_native::cuda
