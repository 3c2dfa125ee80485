#include "gemv/heuristics.h"

#include <algorithm>

namespace qlora_native::cuda {
namespace {

// Beyond this the FP32 pipe, not memory, limits the GEMV, and the tiled kernel reuses each decoded
// weight more often.
constexpr int64_t kMaxPreferredRows = 8;

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

/// The smallest of 1, 2, 4, 8 that holds m, or 8.
int x_rows_for(int64_t m) {
  int rows = 1;
  while (rows < 8 && rows < m) rows *= 2;
  return rows;
}

}  // namespace

GemvPlan plan_gemv(const GemvProblem& problem) {
  GemvPlan plan{};
  // A lane's 16 bytes are 32 elements: with K a multiple of 32 they are aligned in every row and
  // lie in one quantization block.
  plan.vectorized = problem.k % 32 == 0 && problem.packed_is_aligned;
  plan.x_rows = x_rows_for(problem.m);
  plan.weight_rows = plan.vectorized ? kGemvWeightRows : 1;
  plan.weight_tiles = ceil_div(problem.n, int64_t{kGemvWarps} * plan.weight_rows);
  plan.grid = plan.weight_tiles * ceil_div(problem.m, plan.x_rows);
  if (plan.vectorized) {
    const int64_t capacity = gemv_stage_capacity(plan.x_rows, problem.x_elem_bytes);
    plan.stage_k = std::min(capacity, ceil_div(problem.k, kGemvStep) * kGemvStep);
    plan.shared_bytes = ((plan.x_rows - 1) * capacity + plan.stage_k) * problem.x_elem_bytes;
  }
  return plan;
}

GemvMmaPlan plan_gemv_mma(const GemvMmaProblem& problem) {
  GemvMmaPlan plan{};
  const int64_t shares = ceil_div(problem.k, int64_t{256} * kGemvMmaRuns);
  plan.rounds = static_cast<int>(ceil_div(shares, int64_t{kGemvMmaWarps}));
  plan.k_warps = static_cast<int>(ceil_div(shares, int64_t{plan.rounds}));
  plan.row_groups = kGemvMmaWarps / plan.k_warps;
  const int64_t quads = ceil_div(problem.n, int64_t{kGemvMmaQuad});
  const int64_t quad_bytes = problem.m * plan.k_warps * kGemvMmaQuad * int64_t{sizeof(float)};
  const int64_t blocks_for_memory = ceil_div(quads, kGemvMmaPartialBytes / quad_bytes);
  plan.grid = std::max(std::min(quads, problem.processors), blocks_for_memory);
  plan.quads_per_block = static_cast<int>(quads / plan.grid);
  plan.blocks_with_more = static_cast<int>(quads % plan.grid);
  return plan;
}

bool gemv_is_preferred(const GemvProblem& problem) { return problem.m <= kMaxPreferredRows; }

}  // namespace qlora_native::cuda
