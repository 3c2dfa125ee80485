// The copy of a factor that tensor-core kernels read: rounded to 16 bits, transposed where it has
// to be, padded with zeros.
//
// Grid: one thread block of 256 threads per tile of 32 x 32 of the target, which goes through shared
// memory, so that both sides are accessed by rows. Bytes moved: those of the factor, a thousandth of
// what the kernel that follows moves; bound: the launch.
#include <cstdint>

#include "device/grid_dependency.cuh"
#include "device/vec_load.cuh"
#include "host/compiled_architecture.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "lora/prepared_factor.h"

namespace qlora_native::cuda {
namespace {

constexpr int kTile = 32;
constexpr int kThreads = 256;
constexpr int kRowsAtATime = kThreads / kTile;

template <class T, class F>
struct CopyParams {
  const F* source;
  int64_t source_stride, source_rows, source_cols;
  bool transposed;
  T* target;
  int64_t rows, cols;  // of the target
  int64_t row_tiles;
};

template <class T, class F>
__global__ void __launch_bounds__(kThreads) copy_factor_kernel(CopyParams<T, F> p) {
  __shared__ F tile[kTile][kTile + 1];
  const int x = static_cast<int>(threadIdx.x) % kTile;
  const int64_t row0 = blockIdx.x % p.row_tiles * kTile;
  const int64_t col0 = blockIdx.x / p.row_tiles * kTile;
  wait_for_previous_kernel();
  for (int y = static_cast<int>(threadIdx.x) / kTile; y < kTile; y += kRowsAtATime) {
    const int64_t row = (p.transposed ? col0 : row0) + y;
    const int64_t col = (p.transposed ? row0 : col0) + x;
    const bool exists = row < p.source_rows && col < p.source_cols;
    tile[y][x] = exists ? load_after_wait(p.source + row * p.source_stride + col) : F{};
  }
  __syncthreads();
  for (int y = static_cast<int>(threadIdx.x) / kTile; y < kTile; y += kRowsAtATime) {
    const int64_t row = row0 + y;
    const int64_t col = col0 + x;
    if (row >= p.rows || col >= p.cols) continue;
    p.target[row * p.cols + col] = from_float<T>(to_float(p.transposed ? tile[x][y] : tile[y][x]));
  }
}

}  // namespace

bool FactorUse::is_ready() const {
  return !transposed && factor.dtype == dtype && factor.rows == padded_rows &&
         factor.cols == padded_cols && is_aligned(factor.data, 16) && factor.row_stride % 8 == 0;
}

int64_t FactorUse::workspace_bytes() const {
  return is_ready() ? 0 : padded_rows * padded_cols * size_bytes(dtype);
}

MatrixView prepare_factor(const FactorUse& use, Workspace workspace, cudaStream_t stream) {
  if (use.is_ready()) return use.factor;
  const MatrixView prepared{workspace.data,  use.padded_rows, use.padded_cols,
                            use.padded_cols, use.dtype,       use.factor.device};
  if (use.padded_rows == 0 || use.padded_cols == 0) return prepared;
  const int64_t row_tiles = ceil_div(use.padded_rows, kTile);
  visit_16bit_dtype(use.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto copy = [&](auto source_tag) {
      using F = typename decltype(source_tag)::type;
      launch("lora factor", copy_factor_kernel<T, F>,
             {.grid = row_tiles * ceil_div(use.padded_cols, kTile),
              .block = kThreads,
              .overlaps_previous = is_compiled_for_hopper(use.factor.device.index)},
             stream,
             {static_cast<const F*>(use.factor.data), use.factor.row_stride, use.factor.rows,
              use.factor.cols, use.transposed, static_cast<T*>(workspace.data), use.padded_rows,
              use.padded_cols, row_tiles});
    };
    if (use.factor.dtype == use.dtype) {
      copy(tag);
    } else {
      copy(TypeTag<float>{});
    }
  });
  return prepared;
}

}  // namespace qlora_native::cuda
