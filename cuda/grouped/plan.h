// How products of groups are cut into thread blocks. Pure host arithmetic: no CUDA header.
//
// Which group has how many rows is known on the device alone, so the grid is what fills it, or fewer
// thread blocks where there cannot be that many tiles; each walks over tiles until there are none.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

struct GroupedProblem {
  int64_t rows;    ///< of all groups, at least 1
  int64_t cols;    ///< of the output, at least 1
  int64_t groups;  ///< at least 0
  int64_t processors;
};

struct GroupedPlan {
  int tile_rows;
  int64_t column_tiles;
  int64_t grid;
};

/// What a thread block of the tensor-core kernel works on, by the rows of its tile.
struct GroupedMmaShape {
  int tile_rows;  ///< 16, 64 or 128
  int tile_cols;
  int stages;  ///< steps of 64 along the depth that are loaded ahead, and the one in use
  int blocks_per_processor;  /// on sm_90; elsewhere fewer may fit

  constexpr int threads() const { return 2 * tile_cols; }
  constexpr int activation_bytes() const { return tile_rows * 128; }
  constexpr int code_bytes() const { return tile_cols * 32; }
  constexpr int weight_bytes() const { return tile_cols * 128; }
  /// Stages, two tiles of weights, the dynamic map.
  constexpr int shared_bytes() const {
    return stages * (activation_bytes() + code_bytes()) + 2 * weight_bytes() + 1024;
  }
};

/// At most 99 KB of shared memory: what a thread block of every sm_80 and newer can have.
template <int kTileRows>
inline constexpr GroupedMmaShape kGroupedMmaShape =
    kTileRows == 16   ? GroupedMmaShape{16, 64, 6, 5}
    : kTileRows == 64 ? GroupedMmaShape{64, 128, 4, 2}
                      : GroupedMmaShape{128, 128, 3, 2};

GroupedPlan plan_grouped_mma(const GroupedProblem& problem);

inline constexpr int kGroupedSimtTileCols = 64;
inline constexpr int kGroupedSimtBlocks = 3;  ///< per processor

GroupedPlan plan_grouped_simt(const GroupedProblem& problem);

}  // namespace qlora_native::cuda
