#include "gemm/heuristics.h"

#include <algorithm>

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

GemmMmaPlan plan_gemm_mma(const GemmMmaProblem& problem) {
  GemmMmaPlan plan{};
  const int64_t shares = ceil_div(problem.k, int64_t{kGemmMmaShare});
  const int64_t slabs = ceil_div(shares, int64_t{kGemmMmaWarps});
  const int64_t tiles = ceil_div(problem.n, int64_t{kGemmMmaTileRows});
  const int64_t parts = std::min(tiles, std::max<int64_t>(problem.processors / slabs, 1));
  plan.slabs = static_cast<int>(slabs);
  plan.parts = static_cast<int>(parts);
  plan.tiles_per_part = static_cast<int>(tiles / parts);
  plan.parts_with_more = static_cast<int>(tiles % parts);
  plan.k_warps = static_cast<int>(ceil_div(shares, slabs));
  plan.row_groups = kGemmMmaWarps / plan.k_warps;
  return plan;
}

bool gemm_mma_is_preferred(int64_t m) { return m <= kGemmMmaTokens; }

}  // namespace qlora_native::cuda
