#include "gemm/sm90a/plan.h"

#include <algorithm>

#include "gemm/heuristics.h"

namespace qlora_native::cuda {
namespace {

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

constexpr int64_t kRowGroup = 8;
/// Beyond it gemm_mma cuts K, and of more than eight rows the sums that then travel cost what it gains.
constexpr int64_t kMaxDepthOfMma = int64_t{kGemmMmaShare} * kGemmMmaWarps;
constexpr int64_t kMaxRowsBeforeDense = 1024;
constexpr int64_t kMaxTransposedRowsBeforeDense = 768;

int tile_rows_for(int64_t rows) {
  for (const int tile_rows : {16, 32, 64, 128}) {
    if (rows <= tile_rows) return tile_rows;
  }
  return 256;
}

/// A share with which thread blocks cut all tiles alike, or have whole ones: they add fewer sums then, and those that
/// read the same activations or lines of codes do so at a time. 0 if none is as good as the smallest but for a few percent.
int64_t aligned_share(int64_t tiles, int64_t chunks, int64_t processors) {
  if (tiles * chunks == 0) return 0;
  const int64_t smallest = ceil_div(tiles * chunks, processors);
  const int64_t largest = smallest + smallest / 20;
  for (int64_t share = smallest; share <= std::min(largest, chunks); ++share) {
    if (chunks % share == 0) return share;
  }
  const int64_t whole = ceil_div(smallest, chunks);
  return whole * chunks <= largest && tiles % whole == 0 ? whole * chunks : 0;
}

}  // namespace

GemmSm90aPlan plan_gemm_sm90a(const GemmSm90aProblem& problem) {
  GemmSm90aPlan plan{};
  plan.tile_rows = tile_rows_for(problem.rows);
  const int64_t row_tiles = ceil_div(problem.rows, plan.tile_rows);
  const int64_t col_tiles = ceil_div(problem.cols, kGemmSm90aTileCols);
  const int64_t chunks = ceil_div(problem.depth, kGemmSm90aChunk);
  const int64_t total = row_tiles * col_tiles * chunks;
  const int64_t share = aligned_share(row_tiles * col_tiles, chunks, problem.processors);
  const int64_t grid =
      share > 0 ? total / share : std::max<int64_t>(std::min(total, problem.processors), 1);
  plan.col_tiles = static_cast<int>(col_tiles);
  plan.row_tiles = static_cast<int>(row_tiles);
  plan.row_group = static_cast<int>(std::min(row_tiles, kRowGroup));
  plan.chunks = static_cast<int>(chunks);
  plan.grid = static_cast<int>(grid);
  plan.share = static_cast<int>(total / grid);
  plan.blocks_with_more = static_cast<int>(total % grid);
  return plan;
}

bool gemm_sm90a_is_preferred(int64_t rows, int64_t depth) {
  return rows > kGemmMmaTokens || (rows > 8 && depth > kMaxDepthOfMma);
}

bool gemm_sm90a_beats_dense(int64_t rows) { return rows <= kMaxRowsBeforeDense; }

bool gemm_transposed_sm90a_beats_dense(int64_t rows) {
  return rows <= kMaxTransposedRowsBeforeDense;
}

}  // namespace qlora_native::cuda
