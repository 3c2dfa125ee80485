// How the CUDA products are cut into thread blocks. Host arithmetic: needs no GPU and no CUDA
// build.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <utility>

#include "gemm/heuristics.h"
#include "gemm/sm90a/plan.h"
#include "gemv/heuristics.h"
#include "grouped/plan.h"
#include "host/table_values.h"
#include "support/number_formats.h"
#include "support/problem.h"

namespace qlora_native::cuda {
namespace {

constexpr int64_t kSharedBytesOfEveryGpu = 48 * 1024;

TEST(GemvPlan, CoversEveryOutputOnce) {
  for (const int64_t m : {1, 2, 3, 5, 8, 9, 17}) {
    for (const int64_t n : {1, 7, 16, 17, 100}) {
      for (const int64_t k : {31, 64, 1056}) {
        const GemvPlan plan = plan_gemv({m, n, k, 2, true});
        std::set<std::pair<int64_t, int64_t>> outputs;
        int64_t computed = 0;
        for (int64_t block = 0; block < plan.grid; ++block) {
          const int64_t m0 = block / plan.weight_tiles * plan.x_rows;
          const int64_t n0 = block % plan.weight_tiles * kGemvWarps * plan.weight_rows;
          for (int64_t i = m0; i < m0 + plan.x_rows && i < m; ++i) {
            for (int64_t j = n0; j < n0 + kGemvWarps * plan.weight_rows && j < n; ++j) {
              outputs.emplace(i, j);
              ++computed;
            }
          }
        }
        EXPECT_EQ(static_cast<int64_t>(outputs.size()), m * n) << "M=" << m << " N=" << n;
        EXPECT_EQ(computed, m * n) << "M=" << m << " N=" << n;
      }
    }
  }
}

TEST(GemvPlan, WideLoadsNeedAlignedRows) {
  EXPECT_TRUE(plan_gemv({1, 16, 4096, 2, true}).vectorized);
  EXPECT_TRUE(plan_gemv({1, 16, 96, 2, true}).vectorized);
  EXPECT_FALSE(plan_gemv({1, 16, 4096, 2, false}).vectorized) << "packed codes are not aligned";
  EXPECT_FALSE(plan_gemv({1, 16, 4096 + 16, 2, true}).vectorized) << "rows start off 16 bytes";
  EXPECT_FALSE(plan_gemv({1, 16, 4095, 2, true}).vectorized) << "rows start in mid-byte";
}

TEST(GemvPlan, StagesWholeStepsInTheSharedMemoryOfEveryGpu) {
  for (const int64_t m : {1, 2, 4, 8, 100}) {
    for (const int64_t elem_bytes : {2, 4}) {
      for (const int64_t k : {32, 1024, 4096, 14336, 28672, 1 << 20}) {
        const GemvPlan plan = plan_gemv({m, 64, k, elem_bytes, true});
        EXPECT_GT(plan.stage_k, 0);
        EXPECT_EQ(plan.stage_k % kGemvStep, 0);
        EXPECT_LE(plan.stage_k, gemv_stage_capacity(plan.x_rows, elem_bytes));
        EXPECT_GE(plan.shared_bytes, plan.stage_k * elem_bytes);
        EXPECT_LE(plan.shared_bytes, kSharedBytesOfEveryGpu - 1024) << "the table needs some";
      }
    }
  }
}

TEST(GemvPlan, LargeWeightsDoNotOverflow) {
  const int64_t n = int64_t{1} << 36;
  const GemvPlan plan = plan_gemv({1, n, 4096, 2, true});
  EXPECT_EQ(plan.grid, n / (kGemvWarps * kGemvWeightRows));
}

TEST(GemvPlan, IsPreferredForFewRowsOnly) {
  EXPECT_TRUE(gemv_is_preferred({1, 4096, 4096, 2, true}));
  EXPECT_TRUE(gemv_is_preferred({8, 4096, 4096, 2, true}));
  EXPECT_FALSE(gemv_is_preferred({9, 4096, 4096, 2, true}));
}

TEST(GemmPlan, CoversEveryOutput) {
  for (const int64_t rows : {1, 16, 17, 33, 64, 65, 1000}) {
    for (const int64_t cols : {1, 63, 64, 65, 4096}) {
      const GemmPlan plan = plan_gemm({rows, cols, 128});
      const int64_t col_tiles = plan.grid / plan.row_tiles;
      EXPECT_EQ(plan.grid, plan.row_tiles * col_tiles);
      EXPECT_GE(plan.row_tiles * plan.tile_rows, rows);
      EXPECT_LT((plan.row_tiles - 1) * plan.tile_rows, rows);
      EXPECT_GE(col_tiles * kGemmTileCols, cols);
      EXPECT_LT((col_tiles - 1) * kGemmTileCols, cols);
    }
  }
}

TEST(GemmPlan, FewRowsTakeASmallTile) {
  EXPECT_EQ(plan_gemm({1, 4096, 4096}).tile_rows, 16);
  EXPECT_EQ(plan_gemm({512, 4096, 4096}).tile_rows, 64);
}

TEST(GroupedPlan, FillsTheGpuButNoMoreThanThereCanBeTiles) {
  for (const auto plan_of : {plan_grouped_mma, plan_grouped_simt}) {
    for (const int64_t rows : {1, 7, 64, 1000, 1 << 20}) {
      for (const int64_t groups : {0, 1, 8, 128}) {
        for (const int64_t cols : {1, 64, 1000, 14336}) {
          const GroupedPlan plan = plan_of({rows, cols, groups, 132});
          EXPECT_GE(plan.grid, 1);
          EXPECT_LE(plan.grid, 132 * 5);
          const int64_t most = rows / plan.tile_rows + std::min(groups + 1, rows);
          EXPECT_LE(plan.grid, most * plan.column_tiles);
        }
      }
    }
  }
  EXPECT_EQ(plan_grouped_mma({8, 1536, 128, 132}).grid, 8 * 24) << "eight groups at most";
}

TEST(GroupedPlan, TilesAreAsLongAsGroupsAreOnAverage) {
  EXPECT_EQ(plan_grouped_mma({8, 1536, 128, 132}).tile_rows, 16);
  EXPECT_EQ(plan_grouped_mma({128 * 40, 1536, 128, 132}).tile_rows, 64);
  EXPECT_EQ(plan_grouped_mma({128 * 256, 1536, 128, 132}).tile_rows, 128);
  EXPECT_EQ(plan_grouped_mma({100, 1536, 1, 132}).tile_rows, 128);
}

TEST(GroupedPlan, EveryTileFitsIntoTheSharedMemoryOfEveryGpu) {
  constexpr int kMost = 99 * 1024;
  EXPECT_LE(GroupedMmaShape<16>::kSharedBytes, kMost);
  EXPECT_LE(GroupedMmaShape<64>::kSharedBytes, kMost);
  EXPECT_LE(GroupedMmaShape<128>::kSharedBytes, kMost);
}

constexpr int64_t kSharedBytesOfHopper = 227 * 1024;

TEST(GemvMmaPlan, GivesEveryRowAndAllOfKToWarps) {
  for (const int64_t processors : {1, 132}) {
    for (const int64_t m : {1, 2}) {
      for (const int64_t n : {1, 3, 4, 5, 31, 4096, 14336, 128256}) {
        for (const int64_t k : {64, 1024, 1088, 4096, 11008, 14336, 28672, 131072}) {
          const GemvMmaPlan plan = plan_gemv_mma({m, n, k, processors});
          const int64_t quads = plan.grid * plan.quads_per_block + plan.blocks_with_more;
          EXPECT_EQ(quads, (n + kGemvMmaQuad - 1) / kGemvMmaQuad) << "N=" << n;
          EXPECT_LT(plan.blocks_with_more, plan.grid);
          EXPECT_GE(plan.rounds * plan.k_warps * kGemvMmaRuns * 256, k) << "K=" << k;
          EXPECT_GE(plan.row_groups, 1);
          EXPECT_LE(plan.row_groups * plan.k_warps, kGemvMmaWarps);
        }
      }
    }
  }
}

TEST(GemvMmaPlan, SumsFitInSharedMemory) {
  for (const int64_t m : {1, 2}) {
    for (const int64_t n : {4096, 128256, 1 << 20}) {
      for (const int64_t k : {64, 4096, 16384, 131072}) {
        const GemvMmaPlan plan = plan_gemv_mma({m, n, k, 132});
        const int64_t most = plan.quads_per_block + (plan.blocks_with_more > 0 ? 1 : 0);
        EXPECT_LE(most * kGemvMmaQuad * m * plan.k_warps * int64_t{sizeof(float)},
                  kGemvMmaPartialBytes)
            << "M=" << m << " N=" << n << " K=" << k;
      }
    }
  }
}

TEST(GemvMmaPlan, UsesEveryProcessorOnceWhereThereIsWork) {
  EXPECT_EQ(plan_gemv_mma({1, 4096, 4096, 132}).grid, 132);
  EXPECT_EQ(plan_gemv_mma({1, 28672, 8192, 132}).grid, 132);
  EXPECT_EQ(plan_gemv_mma({1, 8, 4096, 132}).grid, 2);
}

TEST(GemmMmaPlan, CoversEveryTileAndAllOfK) {
  for (const int64_t processors : {1, 46, 132}) {
    for (const int64_t n : {1, 16, 17, 1024, 4096, 14336, 128256}) {
      for (const int64_t k : {64, 320, 4096, 4160, 5120, 11008, 14336, 1 << 20}) {
        const GemmMmaPlan plan = plan_gemm_mma({n, k, processors});
        EXPECT_EQ(plan.first_tile_of(0), 0);
        EXPECT_EQ(plan.first_tile_of(plan.parts), (n + 15) / 16);
        for (int part = 0; part < plan.parts; ++part) {
          EXPECT_LT(plan.first_tile_of(part), plan.first_tile_of(part + 1));
        }
        EXPECT_GE(int64_t{plan.slabs} * plan.k_warps * kGemmMmaShare, k);
        EXPECT_LT(int64_t{plan.slabs - 1} * plan.k_warps * kGemmMmaShare, k) << "none is empty";
        EXPECT_GE(plan.row_groups, 1);
        EXPECT_LE(plan.row_groups * plan.k_warps, kGemmMmaWarps);
        EXPECT_TRUE(plan.parts == 1 || plan.parts * plan.slabs <= processors) << "run at a time";
      }
    }
  }
}

TEST(GemmMmaPlan, SumsTravelOnlyWhereKIsCut) {
  EXPECT_EQ(plan_gemm_mma({14336, 4096, 132}).workspace_bytes(16), 0);
  const GemmMmaPlan plan = plan_gemm_mma({4096, 14336, 132});
  EXPECT_EQ(plan.slabs, 4);
  EXPECT_EQ(plan.parts, 33);
  EXPECT_EQ(plan.flag_bytes(), 3 * 33 * 8 + 8) << "the sums are aligned to 16 bytes";
  EXPECT_EQ(plan.workspace_bytes(16) - plan.flag_bytes(), 3 * 16 * 4096 * 4);
  const GemmMmaPlan long_plan = plan_gemm_mma({128256, 8192, 132});
  EXPECT_GE(long_plan.flag_bytes(), 66 * 4 * 8) << "one for every pass of 32 tiles";
}

TEST(GemmMmaPlan, ServesFewRowsOfX) {
  EXPECT_TRUE(gemm_mma_is_preferred(3));
  EXPECT_TRUE(gemm_mma_is_preferred(16));
  EXPECT_FALSE(gemm_mma_is_preferred(17));
}

TEST(GemmSm90aPlan, SharesAreEvenAndCoverAllChunks) {
  for (const int64_t processors : {1, 46, 132}) {
    for (const int64_t rows : {1, 16, 17, 33, 64, 65, 128, 129, 256, 257, 2048, 2049}) {
      for (const int64_t cols : {1, 128, 129, 1024, 4096, 14336, 28672}) {
        for (const int64_t depth : {1, 64, 256, 320, 4096, 14336}) {
          const GemmSm90aPlan plan = plan_gemm_sm90a({rows, cols, depth, processors});
          EXPECT_GE(int64_t{plan.row_tiles} * plan.tile_rows, rows);
          EXPECT_LT(int64_t{plan.row_tiles - 1} * plan.tile_rows, rows);
          EXPECT_GE(int64_t{plan.col_tiles} * kGemmSm90aTileCols, cols);
          EXPECT_LT(int64_t{plan.col_tiles - 1} * kGemmSm90aTileCols, cols);
          EXPECT_GE(int64_t{plan.chunks} * kGemmSm90aChunk, depth);
          EXPECT_LT(int64_t{plan.chunks - 1} * kGemmSm90aChunk, depth);
          EXPECT_GE(plan.row_group, 1);
          EXPECT_LE(plan.grid, processors) << "all thread blocks run at a time";
          EXPECT_EQ(plan.first_chunk_of(0), 0);
          EXPECT_EQ(plan.first_chunk_of(plan.grid), plan.row_tiles * plan.col_tiles * plan.chunks);
          for (int block = 0; block < plan.grid; ++block) {
            const int share = plan.first_chunk_of(block + 1) - plan.first_chunk_of(block);
            EXPECT_GE(share, 1);
            EXPECT_GE(share, plan.share);
            EXPECT_LE(share, plan.share + 1);
          }
        }
      }
    }
  }
}

TEST(GemmSm90aPlan, KeepsFlagsAndSumsOfEveryThreadBlock) {
  const GemmSm90aPlan plan = plan_gemm_sm90a({64, 14336, 4096, 132});
  EXPECT_EQ(plan.grid, 132);
  EXPECT_EQ(plan.flag_bytes(), 132 * 8 * 8);
  EXPECT_EQ(plan.flag_bytes() % 16, 0) << "the sums are written by 16 bytes";
  EXPECT_EQ(plan.workspace_bytes() - plan.flag_bytes(), 132 * 64 * 128 * 4);
}

TEST(GemmSm90aPlan, CutsAllTilesAlikeWhereThatCostsLittle) {
  const auto expect_shares = [](int64_t rows, int64_t cols, int64_t depth, int grid, int share,
                                int blocks_with_more) {
    const GemmSm90aPlan plan = plan_gemm_sm90a({rows, cols, depth, 132});
    EXPECT_EQ(plan.grid, grid) << rows << " x " << depth << " x " << cols;
    EXPECT_EQ(plan.share, share);
    EXPECT_EQ(plan.blocks_with_more, blocks_with_more);
  };
  expect_shares(256, 4096, 4096, 128, 4, 0);     // 32 tiles of 16 chunks: 3.9 for each of 132
  expect_shares(256, 4096, 14336, 128, 14, 0);   // of 56: 13.6
  expect_shares(1024, 4096, 14336, 128, 56, 0);  // 128 whole ones: 54.3
  expect_shares(4096, 4096, 4096, 128, 64, 0);   // four whole ones each
  expect_shares(256, 14336, 4096, 132, 13,
                76);  // 112 tiles: whole ones would leave 20 processors idle
  expect_shares(16, 128, 1024, 4, 1, 0);
}

TEST(GemmSm90aPlan, BeatsDenseWhereDecodingOnceDoesNotPay) {
  EXPECT_TRUE(gemm_sm90a_beats_dense(1024));
  EXPECT_FALSE(gemm_sm90a_beats_dense(1025));
  EXPECT_TRUE(gemm_transposed_sm90a_beats_dense(768));
  EXPECT_FALSE(gemm_transposed_sm90a_beats_dense(769));
}

TEST(GemmSm90aPlan, IsPreferredWhereADenseProductWouldBeFasterStill) {
  for (const int64_t depth : {64, 4096, 14336}) {
    EXPECT_FALSE(gemm_sm90a_is_preferred(8, depth));
    EXPECT_EQ(gemm_sm90a_is_preferred(9, depth), depth > 4096) << "gemm_mma would cut K";
    EXPECT_EQ(gemm_sm90a_is_preferred(16, depth), depth > 4096);
    for (const int64_t rows : {17, 1024, 1025, 1 << 20}) {
      EXPECT_TRUE(gemm_sm90a_is_preferred(rows, depth));
    }
  }
}

/// What a table in `dtype` loses of the codebook's values, relative, root of the mean square.
double table_error(const Codebook& book, DType dtype) {
  const TableValues table = table_values(book, dtype);
  double error = 0;
  double magnitude = 0;
  for (int i = 0; i < 16; ++i) {
    const double exact = book.values[i];
    const double kept = testing::round_to(dtype, table.values[i]) * double{table.scale_inverse};
    error += (kept - exact) * (kept - exact);
    magnitude += exact * exact;
  }
  return std::sqrt(error / magnitude);
}

TEST(TableValues, LoseLessThanDecodedWeightsDo) {
  // Rounding any value to 16 bits loses about unit_roundoff / sqrt(3) * 0.74 on average.
  EXPECT_LT(table_error(kNF4, DType::kBFloat16), 0.0007);
  EXPECT_LT(table_error(kNF4, DType::kFloat16), 0.00008);
  for (const Codebook& book : {kFP4, kINT4}) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      EXPECT_LT(table_error(book, dtype), 1e-7) << name(book.type) << " in " << name(dtype);
    }
  }
}

TEST(TableValues, AreKnownForNamedCodebooks) {
  EXPECT_TRUE(has_table_values(kNF4));
  EXPECT_FALSE(has_table_values(testing::uneven_codebook()));
}

}  // namespace
}  // namespace qlora_native::cuda
