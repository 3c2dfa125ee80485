// Products with many rows, over a vector vocabulary `V`: out[M, C] = A[M, D] * B[D, C], where A is
// X or dY, and B is W^T or W. In an unnamed namespace for the reason given in element.h.
//
//   A is converted to fp32 once, into the workspace, as tiles of `tile_rows` rows: [D][tile rows].
//   A task owns kPanelColumns columns of out. For every kMaxPassRows rows and every
//   kPanelDepth of D it decodes a panel of B, [kPanelDepth][kPanelColumns] fp32, on its stack, and
//   multiplies all tiles of A with it in registers, adding to sums that stay on its stack as well.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/decode.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kPanelDepth = 256;
constexpr int64_t kMaxPassRows = 256;
constexpr int64_t kCodesPerCacheLine = 128;
constexpr int64_t kRowsAhead = 16;  ///< of W, fetched before they are decoded

struct GemmProblem {
  MatrixView a;  ///< [M, D]
  QuantizedView weight;
  VectorView bias;        ///< [C] or null
  MutableMatrixView out;  ///< [M, C]
};

/// Rows of a register tile: as many as fit, shared evenly, so that the last tile is nearly full
/// too.
template <class V>
int64_t tile_rows(int64_t m_size) {
  const int64_t tiles = (m_size + V::kGemmRows - 1) / V::kGemmRows;
  return (m_size + tiles - 1) / tiles;
}

/// Rows [m0, m0 + rows) of A, transposed: out[d * rows + m].
template <class V>
void pack_tile(const MatrixView& a, int64_t m0, int64_t rows, float* out) {
  constexpr int64_t kPiece = 64;
  float piece[kPiece];
  for (int64_t d = 0; d < a.cols; d += kPiece) {
    const int64_t count = std::min(kPiece, a.cols - d);
    for (int64_t m = 0; m < rows; ++m) {
      load_run<V>(a.data, (m0 + m) * a.row_stride + d, count, a.dtype, piece);
      for (int64_t i = 0; i < count; ++i) out[(d + i) * rows + m] = piece[i];
    }
  }
}

/// B = W^T: panel[d][c] = W[c0 + c][d0 + d]; columns past the last row of W are zeros.
template <class V>
void decode_panel_of_transpose(const QuantizedView& weight, int64_t d0, int64_t depth, int64_t c0,
                               float* panel) {
  constexpr int64_t kWidth = V::kWidth;
  constexpr int64_t kColumns = V::kGemmVectors * kWidth;
  float rows[kWidth][kPanelDepth + 2 * kWidth];
  for (int64_t c = 0; c < kColumns; c += kWidth) {
    const int64_t real_rows = std::clamp<int64_t>(weight.rows - c0 - c, 0, kWidth);
    for (int64_t r = 0; r < real_rows; ++r) {
      const int64_t begin = (c0 + c + r) * weight.cols + d0;
      decode_run<V>(weight, begin, depth, rows[r]);
      // The same row's part of the next panel arrives while this one is multiplied.
      for (int64_t d = 0; d < depth; d += kCodesPerCacheLine) {
        V::prefetch(weight.packed + (begin + depth + d) / 2);
      }
    }
    for (int64_t r = real_rows; r < kWidth; ++r) std::memset(rows[r], 0, sizeof(rows[r]));
    // The transpose of the last, partial, square writes rows of the panel that nobody reads.
    for (int64_t d = 0; d < depth; d += kWidth) {
      V::transpose(rows[0] + d, kPanelDepth + 2 * kWidth, panel + d * kColumns + c, kColumns);
    }
  }
}

/// B = W: panel[d][c] = W[d0 + d][c0 + c]; columns past the last of W are zeros.
template <class V>
void decode_panel(const QuantizedView& weight, int64_t d0, int64_t depth, int64_t c0,
                  float* panel) {
  constexpr int64_t kColumns = V::kGemmVectors * V::kWidth;
  const int64_t columns = std::min(kColumns, weight.cols - c0);
  // decode_run may write past a row: into the next one, which comes later, or the panel's padding.
  for (int64_t d = 0; d < depth; ++d) {
    float* row = panel + d * kColumns;
    const int64_t begin = (d0 + d) * weight.cols + c0;
    V::prefetch(weight.packed + (begin + kRowsAhead * weight.cols) / 2);
    decode_run<V>(weight, begin, columns, row);
    if (columns < kColumns) std::fill(row + columns, row + kColumns, 0.0f);
  }
}

/// sums[kRows][columns] += a[depth][kRows]^T * panel[depth][columns], columns = kGemmVectors
/// vectors.
template <class V, int kRows>
void multiply_tile(const float* a, const float* panel, int64_t depth, float* sums) {
  using Floats = typename V::Floats;
  constexpr int kVectors = V::kGemmVectors;
  constexpr int64_t kColumns = kVectors * V::kWidth;
  Floats acc[kRows][kVectors];
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVectors; ++v) acc[m][v] = V::load(sums + m * kColumns + v * V::kWidth);
  }
  for (int64_t d = 0; d < depth; ++d) {
    Floats b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = V::load(panel + d * kColumns + v * V::kWidth);
    for (int m = 0; m < kRows; ++m) {
      const Floats am = V::set1(a[d * kRows + m]);
      for (int v = 0; v < kVectors; ++v) acc[m][v] = V::fma(am, b[v], acc[m][v]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVectors; ++v) V::store(sums + m * kColumns + v * V::kWidth, acc[m][v]);
  }
}

using MultiplyTileFn = void (*)(const float* a, const float* panel, int64_t depth, float* sums);

template <class V, int... kRows>
MultiplyTileFn multiply_tile_fn(int64_t rows, std::integer_sequence<int, kRows...>) {
  constexpr MultiplyTileFn kFns[] = {multiply_tile<V, kRows + 1>...};
  return kFns[rows - 1];
}

/// One task: columns [c0, c0 + kColumns) of out, as far as there are any.
template <class V, bool kWeightIsTransposed>
void multiply_columns(const GemmProblem& problem, const float* a, int64_t c0) {
  constexpr int64_t kColumns = V::kGemmVectors * V::kWidth;
  const int64_t m_size = problem.a.rows;
  const int64_t depth_size = problem.a.cols;
  const int64_t tile = tile_rows<V>(m_size);
  const int64_t pass_rows = kMaxPassRows / tile * tile;
  const int64_t columns = std::min(kColumns, problem.out.cols - c0);
  alignas(64) float panel[(kPanelDepth + V::kWidth) * kColumns];
  alignas(64) float sums[kMaxPassRows * kColumns];
  for (int64_t m0 = 0; m0 < m_size; m0 += pass_rows) {
    const int64_t m_end = std::min(m0 + pass_rows, m_size);
    std::memset(sums, 0, static_cast<size_t>((m_end - m0) * kColumns) * sizeof(float));
    for (int64_t d0 = 0; d0 < depth_size; d0 += kPanelDepth) {
      const int64_t depth = std::min(kPanelDepth, depth_size - d0);
      if constexpr (kWeightIsTransposed) {
        decode_panel_of_transpose<V>(problem.weight, d0, depth, c0, panel);
      } else {
        decode_panel<V>(problem.weight, d0, depth, c0, panel);
      }
      for (int64_t m = m0; m < m_end; m += tile) {
        const int64_t rows = std::min(tile, m_size - m);
        const MultiplyTileFn multiply =
            multiply_tile_fn<V>(rows, std::make_integer_sequence<int, V::kGemmRows>{});
        multiply(a + m * depth_size + d0 * rows, panel, depth, sums + (m - m0) * kColumns);
      }
    }
    for (int64_t m = m0; m < m_end; ++m) {
      for (int64_t c = 0; c < columns; ++c) {
        const float bias =
            problem.bias.data ? load_element(problem.bias.data, c0 + c, problem.bias.dtype) : 0.0f;
        store_element(problem.out.data, m * problem.out.row_stride + c0 + c, problem.out.dtype,
                      sums[(m - m0) * kColumns + c] + bias);
      }
    }
  }
}

template <class V, bool kWeightIsTransposed>
void gemm(const GemmProblem& problem, Workspace workspace) {
  constexpr int64_t kColumns = V::kGemmVectors * V::kWidth;
  auto* a = static_cast<float*>(workspace.data);
  const int64_t m_size = problem.a.rows;
  const int64_t tile = tile_rows<V>(m_size);
  parallel_for((m_size + tile - 1) / tile, 1, [&](int64_t first, int64_t last) {
    for (int64_t m = first * tile; m < std::min(last * tile, m_size); m += tile) {
      pack_tile<V>(problem.a, m, std::min(tile, m_size - m), a + m * problem.a.cols);
    }
  });
  // Neighbouring columns of W share cache lines: a task takes all of a line.
  constexpr int64_t kPanelsPerTask = kWeightIsTransposed ? 1 : 128 / kColumns;
  parallel_for((problem.out.cols + kColumns - 1) / kColumns, kPanelsPerTask,
               [&](int64_t first, int64_t last) {
                 for (int64_t panel = first; panel < last; ++panel) {
                   multiply_columns<V, kWeightIsTransposed>(problem, a, panel * kColumns);
                 }
               });
}

template <class V>
void gemm(const MatmulArgs& args, Workspace workspace) {
  gemm<V, true>(GemmProblem{args.x, args.weight, args.bias, args.y}, workspace);
}

template <class V>
void gemm_transposed(const MatmulTransposedArgs& args, Workspace workspace) {
  gemm<V, false>(GemmProblem{args.dy, args.weight, {}, args.dx}, workspace);
}

}  // namespace
}  // namespace qlora_native::cpu
