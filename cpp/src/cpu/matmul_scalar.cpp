// The reference products: plain loops over decoded pieces of W, in fp32.
#include <algorithm>

#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kPiece = 256;  ///< elements of W decoded at a time
constexpr int64_t kRows = 16;    ///< rows of X that share a decoded piece

}  // namespace

void matmul_scalar(const MatmulArgs& args, Workspace) {
  const MatrixView& x = args.x;
  const MutableMatrixView& y = args.y;
  const int64_t k_size = args.weight.cols;
  parallel_for(args.weight.rows, 1, [&](int64_t first, int64_t last) {
    float w[kPiece];
    for (int64_t n = first; n < last; ++n) {
      for (int64_t m0 = 0; m0 < x.rows; m0 += kRows) {
        const int64_t rows = std::min(kRows, x.rows - m0);
        float sums[kRows] = {};
        for (int64_t k0 = 0; k0 < k_size; k0 += kPiece) {
          const int64_t count = std::min(kPiece, k_size - k0);
          decode_elements(args.weight, n * k_size + k0, count, w);
          for (int64_t m = 0; m < rows; ++m) {
            const int64_t row = (m0 + m) * x.row_stride + k0;
            for (int64_t k = 0; k < count; ++k)
              sums[m] += load_element(x.data, row + k, x.dtype) * w[k];
          }
        }
        const float bias = args.bias.data ? load_element(args.bias.data, n, args.bias.dtype) : 0.0f;
        for (int64_t m = 0; m < rows; ++m) {
          store_element(y.data, (m0 + m) * y.row_stride + n, y.dtype, sums[m] + bias);
        }
      }
    }
  });
}

void matmul_transposed_scalar(const MatmulTransposedArgs& args, Workspace) {
  const MatrixView& dy = args.dy;
  const MutableMatrixView& dx = args.dx;
  const int64_t k_size = args.weight.cols;
  parallel_for(k_size, kPiece, [&](int64_t first, int64_t last) {
    float w[kPiece];
    float sums[kRows][kPiece];
    for (int64_t k0 = first; k0 < last; k0 += kPiece) {
      const int64_t count = std::min(kPiece, last - k0);
      for (int64_t m0 = 0; m0 < dy.rows; m0 += kRows) {
        const int64_t rows = std::min(kRows, dy.rows - m0);
        std::memset(sums, 0, sizeof(sums));
        for (int64_t n = 0; n < args.weight.rows; ++n) {
          decode_elements(args.weight, n * k_size + k0, count, w);
          for (int64_t m = 0; m < rows; ++m) {
            const float scale = load_element(dy.data, (m0 + m) * dy.row_stride + n, dy.dtype);
            for (int64_t k = 0; k < count; ++k) sums[m][k] += scale * w[k];
          }
        }
        for (int64_t m = 0; m < rows; ++m) {
          const int64_t row = (m0 + m) * dx.row_stride + k0;
          for (int64_t k = 0; k < count; ++k) store_element(dx.data, row + k, dx.dtype, sums[m][k]);
        }
      }
    }
  });
}

}  // namespace qlora_native::cpu
