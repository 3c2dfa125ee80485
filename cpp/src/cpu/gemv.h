// Products with few rows of X, over a vector vocabulary `V`. Every weight is decoded in registers,
// once for up to four rows of X, and never stored. In an unnamed namespace for the reason given in
// element.h.
//
// Both products keep vectors split into even and odd positions, because a byte of codes decodes to
// one of each: a "unit" is 2 * V::kWidth elements, stored as the even ones and then the odd ones.
//
// Pre: every row of W starts at a block (see rows_hold_whole_blocks).
#pragma once

#include <type_traits>

#include "cpu/decode.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int kMaxTileM = 4;               ///< rows of X in a register tile
constexpr int64_t kMaxSegmentBlocks = 64;  ///< blocks of a row whose scales are decoded at a time

/// Calls fn(integral_constant<int, rows>), 1 <= rows <= kMaxTileM.
template <class Fn>
void with_constant_rows(int64_t rows, Fn&& fn) {
  switch (rows) {
    case 1:
      return fn(std::integral_constant<int, 1>{});
    case 2:
      return fn(std::integral_constant<int, 2>{});
    case 3:
      return fn(std::integral_constant<int, 3>{});
    default:
      return fn(std::integral_constant<int, kMaxTileM>{});
  }
}

/// Calls fn(m0, integral_constant<int, rows>) for tiles of at most kMaxTileM rows that cover [0,
/// m_size).
template <class Fn>
void for_each_row_tile(int64_t m_size, Fn&& fn) {
  for (int64_t m = 0; m < m_size; m += kMaxTileM) {
    with_constant_rows(std::min<int64_t>(kMaxTileM, m_size - m), [&](auto rows) { fn(m, rows); });
  }
}

/// Splits rows of `x` into units; row m to out + m * x.cols. x.cols is a multiple of the unit.
template <class V>
void split_rows(const MatrixView& x, float* out) {
  constexpr int64_t kUnit = 2 * V::kWidth;
  for (int64_t m = 0; m < x.rows; ++m) {
    for (int64_t k = 0; k < x.cols; k += kUnit) {
      float unit[kUnit];
      load_run<V>(x.data, m * x.row_stride + k, kUnit, x.dtype, unit);
      V::store_split(out + m * x.cols + k, V::load(unit), V::load(unit + V::kWidth));
    }
  }
}

// ---- Y = X W^T: a tile is kM rows of X times kN rows of W, along the whole of K ----

/// sums[m][n] = dot(x row m, W row n0 + n); x is split, with rows of weight.cols floats.
template <class V, int kM, int kN>
void dot_rows(const QuantizedView& weight, int64_t n0, const float* x, float (&sums)[kM][kN]) {
  using Floats = typename V::Floats;
  constexpr int64_t kUnit = 2 * V::kWidth;
  // Two chains of additions for a lone row of X hide the latency of the FMA.
  constexpr int kChains = kM == 1 ? 2 : 1;
  const int64_t k_size = weight.cols;
  const int64_t blocks_per_row = k_size / weight.block_size;
  const int64_t units_per_block = weight.block_size / kUnit;
  const int64_t row_bytes = k_size / 2;
  const typename V::Table values = V::load_table(weight.codebook.values);
  const uint8_t* packed = weight.packed + n0 * row_bytes;

  Floats acc[kM][kN][kChains];
  for (auto& row : acc) {
    for (auto& chains : row) {
      for (auto& chain : chains) chain = V::zero();
    }
  }
  for (int64_t segment = 0; segment < blocks_per_row; segment += kMaxSegmentBlocks) {
    const int64_t left = blocks_per_row - segment;
    const int64_t blocks = left < kMaxSegmentBlocks ? left : kMaxSegmentBlocks;
    float scales[kN][kMaxSegmentBlocks + kScalePadding];
    for (int n = 0; n < kN; ++n) {
      decode_scales<V>(weight.absmax, (n0 + n) * blocks_per_row + segment, blocks, scales[n]);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      typename V::Table table[kN];
      for (int n = 0; n < kN; ++n) table[n] = V::scale(values, scales[n][block]);
      for (int64_t unit = 0; unit < units_per_block; ++unit) {
        for (int n = 0; n < kN; ++n) {
          Floats even;
          Floats odd;
          V::decode_pairs(packed + n * row_bytes, table[n], &even, &odd);
          // The next tile's rows: the hardware follows a row, but does not foresee where the next
          // begins.
          V::prefetch(packed + (kN + n) * row_bytes);
          for (int m = 0; m < kM; ++m) {
            const float* xm = x + m * k_size;
            acc[m][n][0] = V::fma(even, V::load(xm), acc[m][n][0]);
            acc[m][n][kChains - 1] = V::fma(odd, V::load(xm + V::kWidth), acc[m][n][kChains - 1]);
          }
        }
        packed += kUnit / 2;
        x += kUnit;
      }
    }
  }
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      Floats total = acc[m][n][0];
      if constexpr (kChains == 2) total = V::add(total, acc[m][n][1]);
      sums[m][n] = V::sum(total);
    }
  }
}

template <class V, int kM, int kN>
void gemv_tile(const MatmulArgs& args, int64_t m0, int64_t n0, const float* x) {
  float sums[kM][kN];
  dot_rows<V, kM, kN>(args.weight, n0, x + m0 * args.weight.cols, sums);
  for (int n = 0; n < kN; ++n) {
    const float bias =
        args.bias.data ? load_element(args.bias.data, n0 + n, args.bias.dtype) : 0.0f;
    for (int m = 0; m < kM; ++m) {
      store_element(args.y.data, (m0 + m) * args.y.row_stride + n0 + n, args.y.dtype,
                    sums[m][n] + bias);
    }
  }
}

/// Rows [n0, n0 + kN) of W with every row of X.
template <class V, int kN>
void gemv_rows(const MatmulArgs& args, int64_t n0, const float* x) {
  for_each_row_tile(args.x.rows,
                    [&](int64_t m0, auto rows) { gemv_tile<V, rows.value, kN>(args, m0, n0, x); });
}

template <class V>
void gemv(const MatmulArgs& args, Workspace workspace) {
  constexpr int kN = V::kGemvRows;
  // 64 rows of 4096 take about 10 us: enough to hide a hand-over, small enough to balance.
  constexpr int64_t kWeightsPerTask = 256 * 1024;
  auto* x = static_cast<float*>(workspace.data);
  split_rows<V>(args.x, x);
  const int64_t k_size = args.weight.cols;
  const int64_t rows_per_task = k_size == 0 ? args.weight.rows : kWeightsPerTask / k_size;
  parallel_for(args.weight.rows, (rows_per_task / kN + 1) * kN, [&](int64_t first, int64_t last) {
    int64_t n = first;
    for (; n + kN <= last; n += kN) gemv_rows<V, kN>(args, n, x);
    for (; n < last; ++n) gemv_rows<V, 1>(args, n, x);
  });
}

// ---- dX = dY W: a task owns a range of columns, and runs down all rows of W ----

constexpr int64_t kTransposedColumns = 1024;  ///< most columns of a task: their sums stay in L1
constexpr int kTransposedRows = 8;            ///< rows of W between a load and a store of the sums

/// sums[m][c] += dy[n][m] * W[n][c0 + c] for kN rows n from n0 on; `sums` has kTransposedColumns
/// floats a row, split; dy has kM floats for each n. kStep units, never more than a block, share
/// a table.
template <class V, int kM, int kN, int kStep>
void add_rows(const QuantizedView& weight, int64_t n0, int64_t c0, int64_t columns, const float* dy,
              float* sums) {
  using Floats = typename V::Floats;
  constexpr int64_t kUnit = 2 * V::kWidth;
  constexpr int64_t kStepColumns = kStep * kUnit;
  constexpr int64_t kMaxBlocks = kTransposedColumns / kMinBlockSize + 1;
  const int64_t row_blocks = weight.cols / weight.block_size;
  const int64_t first_block = c0 / weight.block_size;
  const int64_t blocks = (c0 + columns - 1) / weight.block_size - first_block + 1;
  const typename V::Table values = V::load_table(weight.codebook.values);
  float scales[kN][kMaxBlocks + kScalePadding];
  for (int n = 0; n < kN; ++n) {
    decode_scales<V>(weight.absmax, (n0 + n) * row_blocks + first_block, blocks, scales[n]);
  }
  for (int64_t c = 0; c < columns; c += kStepColumns) {
    const int64_t block = (c0 + c) / weight.block_size - first_block;
    Floats acc[kM][2 * kStep];
    for (int m = 0; m < kM; ++m) {
      for (int i = 0; i < 2 * kStep; ++i) {
        acc[m][i] = V::load(sums + m * kTransposedColumns + c + i * V::kWidth);
      }
    }
    for (int n = 0; n < kN; ++n) {
      const uint8_t* packed = weight.packed + ((n0 + n) * weight.cols + c0 + c) / 2;
      const typename V::Table table = V::scale(values, scales[n][block]);
      V::prefetch(packed + kN * weight.cols / 2);
      for (int unit = 0; unit < kStep; ++unit) {
        Floats even;
        Floats odd;
        V::decode_pairs(packed + unit * kUnit / 2, table, &even, &odd);
        for (int m = 0; m < kM; ++m) {
          const Floats factor = V::set1(dy[n * kM + m]);
          acc[m][2 * unit] = V::fma(even, factor, acc[m][2 * unit]);
          acc[m][2 * unit + 1] = V::fma(odd, factor, acc[m][2 * unit + 1]);
        }
      }
    }
    for (int m = 0; m < kM; ++m) {
      for (int i = 0; i < 2 * kStep; ++i) {
        V::store(sums + m * kTransposedColumns + c + i * V::kWidth, acc[m][i]);
      }
    }
  }
}

/// Columns [c0, c0 + columns) of dX, for kM rows from m0 on; dy holds kM floats for each row of W.
template <class V, int kM, int kStep>
void gemv_transposed_tile(const MatmulTransposedArgs& args, int64_t m0, int64_t c0, int64_t columns,
                          const float* dy) {
  constexpr int64_t kUnit = 2 * V::kWidth;
  float sums[kM][kTransposedColumns] = {};
  int64_t n = 0;
  for (; n + kTransposedRows <= args.weight.rows; n += kTransposedRows) {
    add_rows<V, kM, kTransposedRows, kStep>(args.weight, n, c0, columns, dy + n * kM, sums[0]);
  }
  for (; n < args.weight.rows; ++n) {
    add_rows<V, kM, 1, kStep>(args.weight, n, c0, columns, dy + n * kM, sums[0]);
  }
  for (int m = 0; m < kM; ++m) {
    const int64_t row = (m0 + m) * args.dx.row_stride + c0;
    for (int64_t c = 0; c < columns; c += kUnit) {
      float unit[kUnit];
      V::store_interleaved(unit, V::load(sums[m] + c), V::load(sums[m] + c + V::kWidth));
      for (int64_t i = 0; i < kUnit; ++i) {
        store_element(args.dx.data, row + c + i, args.dx.dtype, unit[i]);
      }
    }
  }
}

/// Transposes rows [m0, m0 + kM) of dy: out[n * kM + m].
template <int kM>
void gather_rows(const MatrixView& dy, int64_t m0, float* out) {
  for (int64_t n = 0; n < dy.cols; ++n) {
    for (int m = 0; m < kM; ++m) {
      out[n * kM + m] = load_element(dy.data, (m0 + m) * dy.row_stride + n, dy.dtype);
    }
  }
}

template <class V, int kM>
void gemv_transposed_columns(const MatmulTransposedArgs& args, int64_t m0, int64_t first,
                             int64_t last, const float* dy) {
  // Blocks of 32 hold one unit of AVX-512.
  constexpr int kStep = 2;
  for (int64_t c = first; c < last; c += kTransposedColumns) {
    const int64_t columns = last - c < kTransposedColumns ? last - c : kTransposedColumns;
    if (args.weight.block_size % (kStep * 2 * V::kWidth) == 0) {
      gemv_transposed_tile<V, kM, kStep>(args, m0, c, columns, dy);
    } else {
      gemv_transposed_tile<V, kM, 1>(args, m0, c, columns, dy);
    }
  }
}

template <class V>
void gemv_transposed(const MatmulTransposedArgs& args, Workspace workspace) {
  auto* dy = static_cast<float*>(workspace.data);
  const int64_t m_size = args.dy.rows;
  const int64_t n_size = args.weight.rows;
  // A step of a tile is at most 64 columns, and divides a block or is divided by it.
  constexpr int64_t kGrain = 64;
  const int64_t share = args.weight.cols / cpu_threads() / kGrain * kGrain;
  const int64_t columns = std::clamp(share, kGrain, kTransposedColumns);
  for_each_row_tile(m_size, [&](int64_t m0, auto rows) {
    gather_rows<rows.value>(args.dy, m0, dy + m0 * n_size);
  });
  parallel_for(args.weight.cols, columns, [&](int64_t first, int64_t last) {
    for_each_row_tile(m_size, [&](int64_t m0, auto rows) {
      gemv_transposed_columns<V, rows.value>(args, m0, first, last, dy + m0 * n_size);
    });
  });
}

}  // namespace
}  // namespace qlora_native::cpu
