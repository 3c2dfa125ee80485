// How the tiled matrix product is cut into thread blocks. Pure host arithmetic: no CUDA header.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// out[rows, cols] = sum over `depth` of activations[rows, depth] * weight: forward has cols = N
/// and depth = K, transposed has cols = K and depth = N.
struct GemmProblem {
  int64_t rows;
  int64_t cols;
  int64_t depth;
};

struct GemmPlan {
  int tile_rows;      ///< 16 or 64
  int64_t row_tiles;  ///< thread block b has row tile b % row_tiles, column tile b / row_tiles
  int64_t grid;
};

inline constexpr int kGemmTileCols = 64;

GemmPlan plan_gemm(const GemmProblem& problem);

}  // namespace qlora_native::cuda
