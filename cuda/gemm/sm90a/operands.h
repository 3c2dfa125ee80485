// What the products on Hopper take, and how they see it: the host's side.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "gemm/sm90a/out_tile.cuh"
#include "gemm/sm90a/plan.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/mma_args.h"
#include "qlora_native/views.h"

namespace qlora_native::cuda::sm90a {

constexpr int kMaxSharedBytes = 232448;           ///< what a thread block of sm_90 can have
constexpr int64_t kMaxExtent = int64_t{1} << 30;  ///< the kernels number by 32 bits

/// Bytes from a row to the next. Of a single row any will do: it may be one that the tensor copy engine does not
/// take.
inline int64_t row_stride_bytes(const MatrixView& activations) {
  return (activations.rows == 1 ? ceil_div(activations.cols, int64_t{8}) * 8
                                : activations.row_stride) *
         2;
}

/// Whether the kernels can number tiles, steps, rows and columns of the product with `cols` columns.
inline bool fits(const MatrixView& activations, int64_t cols, std::string* why_not) {
  constexpr int64_t kSmallestTileRows = 16;
  constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;
  if (activations.cols == 0) {
    *why_not = "there is nothing to sum";
    return false;
  }
  if (row_stride_bytes(activations) >= kMaxStrideBytes) {
    *why_not = "rows of the activations are " + std::to_string(row_stride_bytes(activations)) +
               " bytes apart, the copy engine takes less than 2^40";
    return false;
  }
  const bool is_large =
      activations.rows > kMaxExtent || cols > kMaxExtent || activations.cols > kMaxExtent;
  // Of factors up to 2^30 the first product cannot overflow.
  const int64_t tiles =
      is_large ? kMaxExtent + 1
               : (activations.rows / kSmallestTileRows + 1) * (cols / kGemmSm90aTileCols + 1);
  if (tiles > kMaxExtent || tiles * (activations.cols / kGemmSm90aChunk + 1) > kMaxExtent) {
    *why_not = "a product of " + std::to_string(activations.rows) + " x " +
               std::to_string(activations.cols) + " x " + std::to_string(cols) +
               " has more than 2^30 parts, rows or columns";
    return false;
  }
  return true;
}

/// Whether the kernels take activations, a weight and a product with `cols` columns. If not, says why in `*why_not`.
inline bool supports(const MatrixView& activations, const QuantizedView& weight, int64_t cols,
                     std::string* why_not) {
  return suits_tables(weight.codebook, why_not) &&
         suits_tensor_cores(activations, weight, why_not) && fits(activations, cols, why_not);
}

/// Calls `visitor` with the tile's rows, one of kFirst and kOthers, as a constant.
template <int kFirst, int... kOthers, class Visitor>
void visit_tile_rows(int tile_rows, const Visitor& visitor) {
  if constexpr (sizeof...(kOthers) > 0) {
    if (tile_rows != kFirst) return visit_tile_rows<kOthers...>(tile_rows, visitor);
  }
  visitor(std::integral_constant<int, kFirst>{});
}

template <class T>
OutMatrix<T> out_matrix(const VectorView& bias, const MutableMatrixView& out) {
  return {.bias = static_cast<const T*>(bias.data),
          .data = static_cast<T*>(out.data),
          .row_stride = out.row_stride,
          .rows = static_cast<int>(out.rows),
          .cols = static_cast<int>(out.cols),
          .is_aligned = is_aligned(out.data, 16) && out.row_stride % 8 == 0};
}

}  // namespace qlora_native::cuda::sm90a
