// The passes of adapters in portable loops, fp32 throughout:
//   lora_project   t [M, r]  = scaling * D(x) [M, C] * F [C, r]
//   lora_update    y [M, C] += D(scaling * t [M, r] * F [r, C])
//   lora_gradient  g [r, C]  = scaling * s^T [r, M] * D(v) [M, C]
//
// The factor is first turned into panels of sixteen columns of F, [panel][row of F][16] in fp32, in
// the workspace. Each element is summed in one order.
#include <algorithm>

#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "dropout_mask.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kPanel = 16;        ///< columns of a panel: what the inner loops run over
constexpr int64_t kRows = 4;          ///< rows of x or y that share a piece of a panel
constexpr int64_t kPiece = 256;       ///< elements of a row that are converted at a time
constexpr int64_t kPanelGroup = 8;    ///< panels that share a converted piece of x
constexpr int64_t kGradientRows = 8;  ///< rows of v whose products are added at a time
constexpr int64_t kGradientTile = 64;

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

template <DType kType>
void load_typed(const void* data, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = load_element(data, first + i, kType);
}

/// Elements [col, col + count) of a row as fp32.
void load_floats(const MatrixView& view, int64_t row, int64_t col, int64_t count, float* out) {
  const int64_t first = row * view.row_stride + col;
  if (view.dtype == DType::kFloat32) {
    load_typed<DType::kFloat32>(view.data, first, count, out);
  } else if (view.dtype == DType::kFloat16) {
    load_typed<DType::kFloat16>(view.data, first, count, out);
  } else {
    load_typed<DType::kBFloat16>(view.data, first, count, out);
  }
}

/// Zeros what is not kept of `count` elements that begin at column `col`, a multiple of eight.
void drop(const DropoutMask& mask, int64_t row, int64_t col, int64_t count, float* values) {
  if (!mask.drops()) return;
  for (int64_t i = 0; i < count; i += kDropoutUnit) {
    const uint32_t kept = mask.kept(row, (col + i) / kDropoutUnit);
    for (int64_t j = 0; j < std::min<int64_t>(kDropoutUnit, count - i); ++j) {
      if ((kept >> j & 1u) == 0) values[i + j] = 0.0f;
    }
  }
}

/// An fp32 element of a factor as the activations' dtype has it.
float rounded_to(DType dtype, float value) {
  if (dtype == DType::kFloat16) return half_to_float(float_to_half(value));
  if (dtype == DType::kBFloat16) return bfloat16_to_float(float_to_bfloat16(value));
  return value;
}

/// F [depth, cols] in panels. `is_transposed`: the factor is stored as [cols, depth].
void pack_factor(const MatrixView& factor, bool is_transposed, DType dtype, int64_t depth,
                 int64_t cols, float* panels) {
  const bool rounds = factor.dtype == DType::kFloat32 && dtype != DType::kFloat32;
  parallel_for(ceil_div(cols, kPanel), 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      float* const out = panels + panel * depth * kPanel;
      const int64_t width = std::min(kPanel, cols - panel * kPanel);
      std::fill(out, out + depth * kPanel, 0.0f);
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t i = 0; i < width; ++i) {
          const int64_t col = panel * kPanel + i;
          const int64_t element =
              is_transposed ? col * factor.row_stride + d : d * factor.row_stride + col;
          const float value = load_element(factor.data, element, factor.dtype);
          out[d * kPanel + i] = rounds ? rounded_to(dtype, value) : value;
        }
      }
    }
  });
}

int64_t panel_bytes(int64_t depth, int64_t cols) {
  return ceil_div(cols, kPanel) * kPanel * depth * static_cast<int64_t>(sizeof(float));
}

/// sums[row][0..16) += left[row][0..depth) * panel[0..depth)[0..16).
template <int64_t kLeftStride>
void multiply_panel(const float (&left)[kRows][kLeftStride], const float* panel, int64_t depth,
                    float (*sums)[kPanel]) {
  float local[kRows][kPanel];
  std::copy(&sums[0][0], &sums[0][0] + kRows * kPanel, &local[0][0]);
  for (int64_t d = 0; d < depth; ++d) {
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t i = 0; i < kPanel; ++i) local[row][i] += left[row][d] * panel[d * kPanel + i];
    }
  }
  std::copy(&local[0][0], &local[0][0] + kRows * kPanel, &sums[0][0]);
}

/// Rows [row0, row0 + rows) of t, columns of panels [first, last), at most kPanelGroup of them.
void project_tile(const LoraProjectArgs& args, const DropoutMask& mask, const float* panels,
                  int64_t row0, int64_t rows, int64_t first, int64_t last) {
  float sums[kPanelGroup][kRows][kPanel] = {};
  float piece[kRows][kPiece] = {};
  const int64_t depth = args.x.cols;
  for (int64_t d0 = 0; d0 < depth; d0 += kPiece) {
    const int64_t count = std::min(kPiece, depth - d0);
    for (int64_t row = 0; row < rows; ++row) {
      load_floats(args.x, row0 + row, d0, count, piece[row]);
      drop(mask, row0 + row, d0, count, piece[row]);
    }
    for (int64_t panel = first; panel < last; ++panel) {
      multiply_panel(piece, panels + (panel * depth + d0) * kPanel, count, sums[panel - first]);
    }
  }
  const float scale = args.scaling * mask.scale;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = first * kPanel; col < std::min(last * kPanel, args.t.cols); ++col) {
      const float sum = sums[col / kPanel - first][row][col % kPanel];
      store_element(args.t.data, (row0 + row) * args.t.row_stride + col, args.t.dtype, sum * scale);
    }
  }
}

/// Rows [row0, row0 + rows) of y, columns [col0, col0 + cols), at most kPiece of them.
void update_tile(const LoraUpdateArgs& args, const DropoutMask& mask, const float* panels,
                 int64_t row0, int64_t rows, int64_t col0, int64_t cols) {
  float sums[kPiece / kPanel][kRows][kPanel] = {};
  float piece[kRows][kPiece] = {};
  const int64_t depth = args.t.cols;
  const int64_t first_panel = col0 / kPanel;
  for (int64_t d0 = 0; d0 < depth; d0 += kPiece) {
    const int64_t count = std::min(kPiece, depth - d0);
    for (int64_t row = 0; row < rows; ++row) {
      load_floats(args.t, row0 + row, d0, count, piece[row]);
    }
    for (int64_t panel = 0; panel < ceil_div(cols, kPanel); ++panel) {
      multiply_panel(piece, panels + ((first_panel + panel) * depth + d0) * kPanel, count,
                     sums[panel]);
    }
  }
  const float scale = args.scaling * mask.scale;
  const MutableMatrixView& y = args.y;
  const MatrixView y_read{y.data, y.rows, y.cols, y.row_stride, y.dtype, y.device};
  float old[kPiece];
  float added[kPiece];
  for (int64_t row = 0; row < rows; ++row) {
    load_floats(y_read, row0 + row, col0, cols, old);
    for (int64_t i = 0; i < cols; ++i) added[i] = sums[i / kPanel][row][i % kPanel] * scale;
    drop(mask, row0 + row, col0, cols, added);
    const int64_t first = (row0 + row) * y.row_stride + col0;
    for (int64_t i = 0; i < cols; ++i) store_element(y.data, first + i, y.dtype, old[i] + added[i]);
  }
}

/// Rows [row0, ...) and columns [col0, ...) of s^T * D(v), at most kGradientTile of each.
void gradient_tile(const LoraGradientArgs& args, const DropoutMask& mask, int64_t row0,
                   int64_t col0) {
  const int64_t rows = std::min(kGradientTile, args.s.cols - row0);
  const int64_t cols = std::min(kGradientTile, args.v.cols - col0);
  float sums[kGradientTile][kGradientTile] = {};
  float s[kGradientRows][kGradientTile] = {};
  float v[kGradientRows][kGradientTile] = {};
  for (int64_t m0 = 0; m0 < args.v.rows; m0 += kGradientRows) {
    const int64_t count = std::min(kGradientRows, args.v.rows - m0);
    for (int64_t m = 0; m < count; ++m) {
      load_floats(args.s, m0 + m, row0, rows, s[m]);
      load_floats(args.v, m0 + m, col0, cols, v[m]);
      drop(mask, m0 + m, col0, cols, v[m]);
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t panel = 0; panel < cols; panel += kPanel) {
        float local[kPanel];
        std::copy(&sums[row][panel], &sums[row][panel] + kPanel, local);
        for (int64_t m = 0; m < count; ++m) {
          for (int64_t i = 0; i < kPanel; ++i) local[i] += s[m][row] * v[m][panel + i];
        }
        std::copy(local, local + kPanel, &sums[row][panel]);
      }
    }
  }
  const float scale = args.scaling * mask.scale;
  const MutableMatrixView& grad = args.grad;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      const int64_t element = args.transposed ? (col0 + col) * grad.row_stride + row0 + row
                                              : (row0 + row) * grad.row_stride + col0 + col;
      store_element(grad.data, element, grad.dtype, sums[row][col] * scale);
    }
  }
}

/// Calls body(i, j) for 0 <= i < outer, 0 <= j < inner, on the threads.
template <class Body>
void for_each_tile(int64_t outer, int64_t inner, const Body& body) {
  parallel_for(outer * inner, 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) body(tile / inner, tile % inner);
  });
}

}  // namespace

int64_t lora_workspace_bytes(const LoraProjectArgs& args) {
  return panel_bytes(args.x.cols, args.t.cols);
}

int64_t lora_workspace_bytes(const LoraUpdateArgs& args) {
  return panel_bytes(args.t.cols, args.y.cols);
}

void lora_project_scalar(const LoraProjectArgs& args, Workspace workspace) {
  auto* const panels = static_cast<float*>(workspace.data);
  const DropoutMask mask = dropout_mask(args.dropout, args.x.cols);
  pack_factor(args.factor, !args.factor_transposed, args.x.dtype, args.x.cols, args.t.cols, panels);
  const int64_t count = ceil_div(args.t.cols, kPanel);
  for_each_tile(ceil_div(args.x.rows, kRows), ceil_div(count, kPanelGroup),
                [&](int64_t block, int64_t group) {
                  const int64_t row0 = block * kRows;
                  project_tile(args, mask, panels, row0, std::min(kRows, args.x.rows - row0),
                               group * kPanelGroup, std::min((group + 1) * kPanelGroup, count));
                });
}

void lora_update_scalar(const LoraUpdateArgs& args, Workspace workspace) {
  auto* const panels = static_cast<float*>(workspace.data);
  const DropoutMask mask = dropout_mask(args.dropout, args.y.cols);
  pack_factor(args.factor, !args.factor_transposed, args.y.dtype, args.t.cols, args.y.cols, panels);
  for_each_tile(ceil_div(args.y.rows, kRows), ceil_div(args.y.cols, kPiece),
                [&](int64_t block, int64_t piece) {
                  const int64_t row0 = block * kRows;
                  const int64_t col0 = piece * kPiece;
                  update_tile(args, mask, panels, row0, std::min(kRows, args.y.rows - row0), col0,
                              std::min(kPiece, args.y.cols - col0));
                });
}

void lora_gradient_scalar(const LoraGradientArgs& args, Workspace) {
  const DropoutMask mask = dropout_mask(args.dropout, args.v.cols);
  for_each_tile(ceil_div(args.s.cols, kGradientTile), ceil_div(args.v.cols, kGradientTile),
                [&](int64_t row_tile, int64_t col_tile) {
                  gradient_tile(args, mask, row_tile * kGradientTile, col_tile * kGradientTile);
                });
}

}  // namespace qlora_native::cpu
