#include "gemm/sm90a/transposed/plan.h"

#include <algorithm>

namespace qlora_native::cuda {
namespace {

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

constexpr int64_t kRowGroup = 8;

int tile_rows_for(int64_t rows) {
  if (rows <= 16) return 16;
  if (rows <= 64) return 64;
  if (rows <= 128) return 128;
  return 256;
}

}  // namespace

GemmTransposedPlan plan_gemm_transposed(const GemmTransposedProblem& problem) {
  GemmTransposedPlan plan{};
  plan.tile_rows = tile_rows_for(problem.rows);
  const int64_t row_tiles = ceil_div(problem.rows, plan.tile_rows);
  const int64_t col_tiles = ceil_div(problem.cols, int64_t{kGemmTransposedTileCols});
  const int64_t tiles = row_tiles * col_tiles;
  plan.steps = static_cast<int>(ceil_div(problem.depth, int64_t{2 * kGemmTransposedStep}) * 2);
  plan.cluster = 1;
  for (int size = 2; size <= kMaxClusterSize; ++size) {
    if (tiles <= problem.clusters.of[size] && plan.steps >= 2 * size) plan.cluster = size;
  }
  plan.split = plan.cluster > 1;
  if (!plan.split && plan.tile_rows == 256) plan.cluster = 2;
  plan.col_items =
      static_cast<int>(plan.split ? col_tiles : ceil_div(col_tiles, int64_t{plan.cluster}));
  plan.row_tiles = static_cast<int>(row_tiles);
  plan.row_group = static_cast<int>(std::min(row_tiles, kRowGroup));
  plan.items = plan.col_items * plan.row_tiles;
  plan.clusters = static_cast<int>(
      std::min<int64_t>(plan.items, std::max<int64_t>(problem.clusters.of[plan.cluster], 1)));
  return plan;
}

bool gemm_transposed_beats_dense(int64_t rows, int64_t weight_elems) {
  constexpr int64_t kLargeWeight = int64_t{1} << 25;
  return rows <= (weight_elems >= kLargeWeight ? 512 : 128);
}

}  // namespace qlora_native::cuda
