#include "gemm/sm80/plan.h"

#include <algorithm>
#include <limits>

namespace qlora_native::cuda {
namespace {

constexpr int64_t kStep = 64;
constexpr int64_t kReservedSharedBytes = 1024;  // by the system, of every thread block

// What cutting tiles costs, writing and adding up their parts, for each thread block of a processor, in steps.
constexpr int64_t kStepsOfCutting = 8;
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
  const int64_t blocks_of_processor =
      std::max<int64_t>(1, blocks_at_a_time<Shape>(problem.shared_bytes));
  const int64_t blocks = problem.processors * blocks_of_processor;
  // Thread blocks of a processor share what bounds them: time is counted in steps of a processor.
  const int64_t whole_time = ceil_div(tiles, problem.processors) * steps;
  const int64_t cut_blocks = std::clamp<int64_t>(tiles * steps / kFewestSteps, 1, blocks);
  const int64_t cut_time = ceil_div(tiles * steps, std::min(cut_blocks, problem.processors)) +
                           kStepsOfCutting * blocks_of_processor;
  const bool is_cut = cut_time < whole_time && tiles * steps <= std::numeric_limits<int32_t>::max();

  plan.pieces = static_cast<int>(is_cut ? steps : 1);
  plan.piece_steps = static_cast<int>(is_cut ? 1 : steps);
  plan.grid = static_cast<int>(is_cut ? cut_blocks : std::min(tiles, blocks));
  const int64_t pieces = tiles * plan.pieces;
  plan.share = static_cast<int>(pieces / plan.grid);
  plan.blocks_with_more = static_cast<int>(pieces % plan.grid);
  return plan;
}

/// A plan with tiles of `Shape` or, where a processor would have one thread block of them, because two do not fit or
/// because there is not enough to do, with those of `LoneShape`.
template <class Shape, class LoneShape>
GemmSm80Plan plan_with_either(const GemmSm80Problem& problem, GemmSm80Tile tile,
                              GemmSm80Tile lone_tile) {
  const GemmSm80Plan plan = plan_with<Shape>(problem, tile);
  return plan.grid > problem.processors ? plan : plan_with<LoneShape>(problem, lone_tile);
}

}  // namespace

GemmSm80Plan plan_gemm_sm80(const GemmSm80Problem& problem) {
  if (problem.rows <= 32) {
    return plan_with_either<GemmSm80Tile32, GemmSm80LoneTile32>(problem, GemmSm80Tile::k32,
                                                                GemmSm80Tile::kLone32);
  }
  if (problem.rows <= 64) {
    return plan_with_either<GemmSm80Tile64, GemmSm80LoneTile64>(problem, GemmSm80Tile::k64,
                                                                GemmSm80Tile::kLone64);
  }
  // The wide tile reads less of shared memory, but the parts that it is cut into are larger.
  if (blocks_at_a_time<GemmSm80WideTile>(problem.shared_bytes) > 0 &&
      problem.cols > GemmSm80Tile128::kCols) {
    const GemmSm80Plan plan = plan_with<GemmSm80WideTile>(problem, GemmSm80Tile::kWide);
    if (2 * plan.tiles >= problem.processors) return plan;
  }
  return plan_with<GemmSm80Tile128>(problem, GemmSm80Tile::k128);
}

bool gemm_sm80_beats_dense(int64_t rows, int compute_capability) {
  // Beside their tensor cores memory is faster on sm_80 than on the others: decoding once costs less there.
  if (compute_capability == 80) return rows <= 512;
  return compute_capability / 10 == 8 && rows <= 1024;
}

}  // namespace qlora_native::cuda
