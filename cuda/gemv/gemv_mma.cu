// Launches the matmul for one or two rows of X (gemv_mma.cuh).
#include <cstdint>
#include <string>
#include <type_traits>

#include "device/architecture.cuh"
#include "gemv/gemv_mma.cuh"
#include "gemv/heuristics.h"
#include "host/device_info.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/mma_args.h"
#include "host/stream.h"
#include "host/table_values.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

using namespace gemv_mma_kernels;

template <class T, int kM, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads, 1)
    gemv_mma_kernel(const __grid_constant__ GemvMmaParams<T> p) {
  // Elsewhere is_gemv_mma_usable() says no.
  if constexpr (kIsHopperOrNewer<T>) multiply<T, kM, kDoubleQuant>(p);
}

template <class T, int kM, bool kDoubleQuant>
void launch_gemv(int device, int64_t grid, const GemvMmaParams<T>& params, cudaStream_t stream) {
  const auto kernel = gemv_mma_kernel<T, kM, kDoubleQuant>;
  static OncePerDevice once;
  once(device, [&] { allow_shared_memory(kernel, kSharedBytes); });
  launch("matmul_4bit gemv_mma", kernel,
         {.grid = grid,
          .block = kThreads,
          .dynamic_shared_bytes = kSharedBytes,
          .overlaps_previous = true},
         stream, params);
}

}  // namespace

bool is_gemv_mma_usable(Device device, std::string* why_not) {
  return is_usable(device, why_not) && has_hopper_resources(device, kSharedBytes, why_not);
}

bool supports_gemv_mma(const MatmulArgs& args, std::string* why_not) {
  return supports_mma(args, kGemvMmaMaxRows, why_not);
}

void gemv_mma(const MatmulArgs& args, Workspace, Stream stream) {
  const QuantizedView& weight = args.weight;
  const DeviceGuard guard(weight.device.index);
  const GemvMmaPlan plan =
      plan_gemv_mma({args.x.rows, weight.rows, weight.cols, processor_count(weight.device)});
  visit_16bit_dtype(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GemvMmaParams<T> params{.x = static_cast<const T*>(args.x.data),
                                  .x_stride = args.x.row_stride,
                                  .packed = weight.packed,
                                  .scales = block_scales(weight),
                                  .table = table_values(weight.codebook, args.x.dtype),
                                  .bias = static_cast<const T*>(args.bias.data),
                                  .y = static_cast<T*>(args.y.data),
                                  .y_stride = args.y.row_stride,
                                  .n = static_cast<int>(weight.rows),
                                  .units = static_cast<int>(weight.cols / kUnit),
                                  .rounds = plan.rounds,
                                  .k_warps = plan.k_warps,
                                  .k_warps_inverse = (65536 + plan.k_warps - 1) / plan.k_warps,
                                  .row_groups = plan.row_groups,
                                  .quads_per_block = plan.quads_per_block,
                                  .blocks_with_more = plan.blocks_with_more};
    visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
      visit_bool(args.x.rows == 1, [&](auto is_single) {
        launch_gemv<T, decltype(is_single)::value ? 1 : 2, decltype(double_quant)::value>(
            weight.device.index, plan.grid, params, to_cuda(stream));
      });
    });
  });
}

}  // namespace qlora_native::cuda
