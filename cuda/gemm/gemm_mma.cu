// Launches the matmul for up to 16 rows of X at a time (gemm_mma.cuh).
#include <algorithm>
#include <cstdint>
#include <string>

#include "device/architecture.cuh"
#include "gemm/gemm_mma.cuh"
#include "gemm/heuristics.h"
#include "host/device_info.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/launch_number.h"
#include "host/mma_args.h"
#include "host/stream.h"
#include "host/table_values.h"
#include "host/tensor_map.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

using namespace gemm_mma_kernels;

template <class T, int kGroups, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_mma_kernel(const __grid_constant__ GemmMmaParams<T> p) {
  // Elsewhere is_gemm_mma_usable() says no.
  if constexpr (kIsHopperOrNewer<T>) multiply<T, kGroups, kDoubleQuant>(p);
}

template <class T, int kGroups, bool kDoubleQuant>
void launch_gemm(int device, const GemmMmaParams<T>& params, cudaStream_t stream) {
  const auto kernel = gemm_mma_kernel<T, kGroups, kDoubleQuant>;
  static OncePerDevice once;
  once(device, [&] { allow_shared_memory(kernel, kSharedBytes); });
  launch("matmul_4bit gemm_mma", kernel,
         {.grid = int64_t{params.plan.parts} * params.plan.slabs,
          .block = kThreads,
          .dynamic_shared_bytes = kSharedBytes,
          .overlaps_previous = true},
         stream, params);
}

GemmMmaPlan plan_of(const MatmulArgs& args) {
  return plan_gemm_mma({args.weight.rows, args.weight.cols, processor_count(args.weight.device)});
}

}  // namespace

bool is_gemm_mma_usable(Device device, std::string* why_not) {
  return is_usable(device, why_not) && has_hopper_resources(device, kSharedBytes, why_not);
}

bool supports_gemm_mma(const MatmulArgs& args, std::string* why_not) {
  return supports_mma(args, kGemmMmaMaxRows, why_not);
}

bool prefers_gemm_mma(const MatmulArgs& args) { return gemm_mma_is_preferred(args.x.rows); }

int64_t gemm_mma_workspace_bytes(const MatmulArgs& args) {
  const int64_t m = std::min(args.x.rows, int64_t{kGemmMmaTokens});
  return plan_of(args).workspace_bytes(m);
}

void gemm_mma(const MatmulArgs& args, Workspace workspace, Stream stream) {
  const QuantizedView& weight = args.weight;
  const DeviceGuard guard(weight.device.index);
  make_context_current(weight.device.index);
  const GemmMmaPlan plan = plan_of(args);
  const CUtensorMap codes = make_tensor_map({.data = weight.packed,
                                             .elem_bytes = 1,
                                             .rows = weight.rows,
                                             .cols = weight.cols / 2,
                                             .stride_bytes = weight.cols / 2,
                                             .box_rows = kTileRows,
                                             .box_cols = kRowBytes});
  visit_16bit_dtype(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t first = 0; first < args.x.rows; first += kGemmMmaTokens) {
      const int64_t m = std::min(args.x.rows - first, int64_t{kGemmMmaTokens});
      const GemmMmaParams<T> params{
          .codes = codes,
          .x = static_cast<const T*>(args.x.data) + first * args.x.row_stride,
          .x_stride = args.x.row_stride,
          .scales = block_scales(weight),
          .table = table_values(weight.codebook, args.x.dtype),
          .bias = static_cast<const T*>(args.bias.data),
          .y = static_cast<T*>(args.y.data) + first * args.y.row_stride,
          .y_stride = args.y.row_stride,
          .m = static_cast<int>(m),
          .n = static_cast<int>(weight.rows),
          .units = static_cast<int>(weight.cols / kUnit),
          .k_warps_inverse = (65536 + plan.k_warps - 1) / plan.k_warps,
          .packed = weight.packed,
          .plan = plan,
          .partial_sums =
              reinterpret_cast<float*>(static_cast<char*>(workspace.data) + plan.flag_bytes()),
          .flags = static_cast<uint64_t*>(workspace.data),
          .ready = next_launch()};
      visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
        visit_bool(m > 8, [&](auto is_wide) {
          launch_gemm<T, decltype(is_wide)::value ? 2 : 1, decltype(double_quant)::value>(
              weight.device.index, params, to_cuda(stream));
        });
      });
    }
  });
}

}  // namespace qlora_native::cuda
