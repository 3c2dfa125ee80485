#include "grouped/plan.h"

#include <algorithm>

namespace qlora_native::cuda {
namespace {

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

/// The rows of a group if all that can have rows have equally many.
int64_t rows_of_a_group(const GroupedProblem& problem) {
  return ceil_div(problem.rows, std::max<int64_t>(1, std::min(problem.groups, problem.rows)));
}

GroupedPlan plan_with(const GroupedProblem& problem, int tile_rows, int tile_cols,
                      int blocks_per_processor) {
  GroupedPlan plan{};
  plan.tile_rows = tile_rows;
  plan.column_tiles = ceil_div(problem.cols, tile_cols);
  // Each group, and the rows of none, may have a tile that is not full.
  const int64_t row_tiles = problem.rows / tile_rows + std::min(problem.groups + 1, problem.rows);
  plan.grid = std::min(problem.processors * blocks_per_processor, row_tiles * plan.column_tiles);
  return plan;
}

template <int kTileRows>
GroupedPlan plan_mma_with(const GroupedProblem& problem) {
  using Shape = GroupedMmaShape<kTileRows>;
  return plan_with(problem, Shape::kRows, Shape::kCols, Shape::kBlocks);
}

}  // namespace

GroupedPlan plan_grouped_mma(const GroupedProblem& problem) {
  // A weight is decoded once for each tile of its group's rows; rows that a tile lacks cost as much
  // as rows that it has.
  const int64_t rows = rows_of_a_group(problem);
  if (rows <= 16) return plan_mma_with<16>(problem);
  return rows <= 64 ? plan_mma_with<64>(problem) : plan_mma_with<128>(problem);
}

GroupedPlan plan_grouped_simt(const GroupedProblem& problem) {
  return plan_with(problem, rows_of_a_group(problem) <= 32 ? 16 : 64, kGroupedSimtTileCols,
                   kGroupedSimtBlocks);
}

}  // namespace qlora_native::cuda
