// How products of groups are cut into thread blocks. Pure host arithmetic: no CUDA header.
//
// Which group has how many rows is known on the device alone, so the grid is what fills it, or fewer
// thread blocks where there cannot be that many tiles; each walks over tiles until there are none.
#pragma once

#include <cstdint>
#include <type_traits>

#include "gemm/mma_shape.h"

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

/// What a thread block of the tensor-core kernel works on, by the rows of its tile: 16, 64 or 128. At most
/// 99 KB of shared memory, what a thread block of every sm_80 and newer can have.
template <int kTileRows>
using GroupedMmaShape =
    std::conditional_t<kTileRows == 16, MmaTileShape<16, 64, 128, 6, 5>,
                       std::conditional_t<kTileRows == 64, MmaTileShape<64, 128, 256, 4, 2>,
                                          MmaTileShape<128, 128, 256, 3, 2>>>;

GroupedPlan plan_grouped_mma(const GroupedProblem& problem);

inline constexpr int kGroupedSimtTileCols = 64;
inline constexpr int kGroupedSimtBlocks = 3;  ///< per processor

GroupedPlan plan_grouped_simt(const GroupedProblem& problem);

}  // namespace qlora_native::cuda
