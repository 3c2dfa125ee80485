#include "gemm/heuristics.h"

#include <algorithm>

namespace qlora_native::cuda {
namespace {

constexpr int kSmallTileRows = 16;
constexpr int kLargeTileRows = 64;

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

constexpr int64_t kMaxPreferredRows = 16;

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
  constexpr int64_t kStep = 256;
  constexpr int64_t kXElemBytes = 2;
  constexpr int64_t kXPadding = 64;  // neighbouring rows of x start in different banks
  GemmMmaPlan plan{};
  const int64_t steps = ceil_div(problem.k, kStep);
  for (plan.cluster = 1;; plan.cluster *= 2) {
    plan.k_steps = static_cast<int>(ceil_div(steps, int64_t{plan.cluster}));
    plan.x_pitch = static_cast<int>(plan.k_steps * kStep * kXElemBytes + kXPadding);
    plan.shared_bytes = static_cast<int>(kGemmMmaXAt + problem.m * plan.x_pitch);
    if (plan.shared_bytes <= kGemmMmaSharedBytes) break;
  }
  if (plan.k_steps > 1) {
    plan.k_steps_inverse = static_cast<uint32_t>(ceil_div(int64_t{1} << 32, int64_t{plan.k_steps}));
  }
  const int64_t tiles = ceil_div(problem.n, int64_t{kGemmMmaTileRows});
  const int64_t clusters = std::min(tiles, std::max(problem.clusters.of[plan.cluster], int64_t{1}));
  plan.grid = static_cast<int>(clusters * plan.cluster);
  plan.tiles_per_cluster = static_cast<int>(tiles / clusters);
  plan.clusters_with_more = static_cast<int>(tiles % clusters);
  // A tile has one slot per warp that works on it; neighbouring tiles share at most one warp.
  const int gaps_per_tile = static_cast<int>(ceil_div(problem.m, int64_t{2}));
  plan.pass_tiles = kGemmMmaSumGaps / gaps_per_tile - (kGemmMmaWarps - 1);
  return plan;
}

bool gemm_mma_is_preferred(int64_t m) { return m <= kMaxPreferredRows; }

}  // namespace qlora_native::cuda
