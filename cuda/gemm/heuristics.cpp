#include "gemm/heuristics.h"

namespace qlora_native::cuda {
namespace {

constexpr int kSmallTileRows = 16;
constexpr int kLargeTileRows = 64;

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

}  // namespace

GemmPlan plan_gemm(const GemmProblem& problem) {
  GemmPlan plan{};
  // A tile that is mostly past the last row computes products nobody reads.
  plan.tile_rows = problem.rows <= 2 * kSmallTileRows ? kSmallTileRows : kLargeTileRows;
  plan.row_tiles = ceil_div(problem.rows, plan.tile_rows);
  plan.grid = plan.row_tiles * ceil_div(problem.cols, kGemmTileCols);
  return plan;
}

}  // namespace qlora_native::cuda
