#include "gemm/sm80/plan.h"

#include <algorithm>
#include <limits>

namespace qlora_native::cuda {
namespace {

constexpr int64_t kStep = 64;
constexpr int64_t kReservedSharedBytes = 1024;  // by the system, of every thread block

// What cutting tiles costs, writing and adding up their parts, in steps of a thread block.
constexpr int64_t kStepsOfSplitting = 8;
// A share that is shorter spends its time filling the pipeline and writing sums.
constexpr int64_t kFewestSteps = 8;

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

template <class Shape>
constexpr int64_t blocks_at_a_time(int64_t shared_bytes) {
  return std::min<int64_t>(Shape::kBlocks,
                           shared_bytes / (Shape::kSharedBytes + kReservedSharedBytes));
}

template <class Shape>
GemmSm80Plan plan_with(const GemmSm80Problem& problem, GemmSm80Tile tile) {
  GemmSm80Plan plan{};
  plan.tile = tile;
  plan.tile_rows = Shape::kRows;
  plan.tile_cols = Shape::kCols;
  const int64_t row_tiles = ceil_div(problem.rows, Shape::kRows);
  const int64_t tiles = row_tiles * ceil_div(problem.cols, Shape::kCols);
  plan.row_tiles = static_cast<int>(row_tiles);
  plan.tiles = static_cast<int>(tiles);
  plan.part_rows = static_cast<int>(std::min<int64_t>(problem.rows, Shape::kRows));

  const int64_t steps = ceil_div(problem.depth, kStep);
  const int64_t blocks =
      std::max<int64_t>(1, problem.processors * blocks_at_a_time<Shape>(problem.shared_bytes));
  const int64_t whole_time = ceil_div(tiles, blocks) * steps;  // of the block with most tiles
  const int64_t split_blocks = std::clamp<int64_t>(tiles * steps / kFewestSteps, 1, blocks);
  const int64_t split_time = ceil_div(tiles * steps, split_blocks) + kStepsOfSplitting;
  const bool is_split =
      split_time < whole_time && tiles * steps <= std::numeric_limits<int32_t>::max();

  plan.pieces = static_cast<int>(is_split ? steps : 1);
  plan.piece_steps = static_cast<int>(is_split ? 1 : steps);
  plan.grid = static_cast<int>(is_split ? split_blocks : std::min(tiles, blocks));
  const int64_t pieces = tiles * plan.pieces;
  plan.share = static_cast<int>(pieces / plan.grid);
  plan.blocks_with_more = static_cast<int>(pieces % plan.grid);
  return plan;
}

}  // namespace

GemmSm80Plan plan_gemm_sm80(const GemmSm80Problem& problem) {
  if (problem.rows <= 32) return plan_with<GemmSm80Tile32>(problem, GemmSm80Tile::k32);
  if (problem.rows <= 64) return plan_with<GemmSm80Tile64>(problem, GemmSm80Tile::k64);
  const bool has_room = blocks_at_a_time<GemmSm80WideTile>(problem.shared_bytes) > 0;
  if (has_room && problem.cols > GemmSm80Tile128::kCols) {
    return plan_with<GemmSm80WideTile>(problem, GemmSm80Tile::kWide);
  }
  return plan_with<GemmSm80Tile128>(problem, GemmSm80Tile::k128);
}

bool gemm_sm80_is_preferred(int64_t rows, int compute_capability) {
  // Beside their tensor cores memory is faster on sm_80 than on the others: decoding once costs less there.
  if (compute_capability == 80) return rows <= 512;
  return compute_capability / 10 == 8 && rows <= 1024;
}

}  // namespace qlora_native::cuda
