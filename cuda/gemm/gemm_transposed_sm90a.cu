// dX[M,K] = dY[M,N] * W[N,K] on Hopper's tensor cores (wgmma), from the codes that Y = X * W^T takes: 16-bit
// activations, fp32 accumulation.
//
// Below, `out` [rows, cols] is dX, and N is the depth. A tile of out^T, 128 columns of out by kTokens of its rows,
// is the sum over steps of 64 elements of depth of
//   (two panels of W, [64, 64] each)^T * (a box of dY [kTokens, 64])^T.
// The panels are 64 rows of W over two groups of 64 columns, decoded to shared memory, where the tensor cores read
// them transposed: with W in registers a lane would need pairs of weights of neighbouring rows.
//
// Thread block, roles by warpgroup:
//   2 multipliers   one panel each: 64 columns of out by kTokens, sums in registers
//   kDecoders       a thread decodes 64 codes with one scale: a row of a panel. Values are rounded to 16 bits
//                   as dequantize rounds them.
//   a copier        one thread brings boxes of activations, another boxes of codes (tensor copy engine)
// Rings in shared memory: stages (two panels), boxes (activations), chunks (codes).
//
// Cluster of 2 side by side: two tiles of the same rows of out, each block brings half of the activations
// for both. Cluster in depth (split): the blocks' sums are added through shared memory, in the order of
// their ranks.
//
// Everything is summed in fixed order: the same arguments give the same bits.
//
// Bound: tensor cores, 4 * kTokens clocks a step; decoding, 310 clocks of the byte permutations' pipe a step.
#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "device/cluster.cuh"
#include "device/grid_dependency.cuh"
#include "device/warp_uniform.cuh"
#include "device/warpgroup.cuh"
#include "gemm/heuristics.h"
#include "gemm/sm90a/operands.h"
#include "gemm/sm90a/transposed/copies.cuh"
#include "gemm/sm90a/transposed/decoders.cuh"
#include "gemm/sm90a/transposed/layout.cuh"
#include "gemm/sm90a/transposed/multipliers.cuh"
#include "gemm/sm90a/transposed/plan.h"
#include "host/cluster_occupancy.h"
#include "host/device_info.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/mma_args.h"
#include "host/stream.h"
#include "host/tensor_map.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace sm90a::transposed {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    gemm_transposed_sm90a_kernel(const __grid_constant__ GemmParams<typename C::Elem> p) {
  extern __shared__ char dynamic_shared[];
  allow_next_kernel();
  const Shared<C> shared{(shared_address(dynamic_shared) + kAlignment - 1) / kAlignment *
                         kAlignment};
  const auto& plan = p.plan;
  const int thread = static_cast<int>(threadIdx.x);
  const int warpgroup = uniform(thread / kWarpgroup);
  const int thread_of_group = thread % kWarpgroup;
  const int rank = static_cast<int>(blockIdx.x) % plan.cluster;
  const int cluster = static_cast<int>(blockIdx.x) / plan.cluster;
  if (thread == 0) {
    prefetch_map(p.activations);
    prefetch_map(p.codes);
    init_barriers(shared, plan);
  }
  if (thread < 256) store_shared(shared.map() + thread * 4, kDynamicMapOnDevice.values[thread]);
  cluster_sync(plan.cluster);
  wait_for_previous_kernel();

  if (warpgroup < kMultipliers) {
    if constexpr (C::kDealsRegisters) take_registers<kMultiplierRegisters>();
    multiply<C>(p, shared, cluster, rank, warpgroup, thread_of_group);
  } else if (warpgroup < kMultipliers + kDecoders) {
    if constexpr (C::kDealsRegisters) give_registers<kDecoderRegisters>();
    decode<C>(p, shared, cluster, rank, warpgroup - kMultipliers, thread_of_group);
    if (plan.split) cluster_sync_of_any();
  } else {
    if (thread_of_group == 0) {
      BoxCopies<C> copies(p, shared, cluster, rank);
      while (copies.start_next()) continue;
    } else if (thread_of_group == kWarpSize) {
      ChunkCopies<C> copies(p, shared, cluster, rank);
      while (copies.start_next()) continue;
    }
    __syncwarp();
    if (plan.split) cluster_sync_of_any();
  }
  // No thread block ends while another still writes to its memory.
  if (plan.cluster > 1) cluster_sync_of_any();
}

template <class C>
void launch_gemm(int device, const GemmParams<typename C::Elem>& params, cudaStream_t stream) {
  const auto kernel = gemm_transposed_sm90a_kernel<C>;
  static OncePerDevice once;
  once(device, [&] { allow_shared_memory(kernel, C::kSharedBytes); });
  launch("matmul_4bit_transposed gemm_sm90a", kernel,
         {.grid = int64_t{params.plan.clusters} * params.plan.cluster,
          .block = C::kThreads,
          .dynamic_shared_bytes = C::kSharedBytes,
          .cluster = params.plan.cluster,
          .overlaps_previous = true},
         stream, params);
}

}  // namespace sm90a::transposed

bool supports_gemm_transposed_sm90a(const MatmulTransposedArgs& args, std::string* why_not) {
  return suits_tensor_cores(args.dy, args.weight, why_not) &&
         sm90a::fits(args.dy, args.dx.cols, why_not);
}

bool dense_beats_gemm_transposed_sm90a(const MatmulTransposedArgs& args) {
  return !gemm_transposed_beats_dense(args.dy.rows, args.weight.rows * args.weight.cols);
}

void gemm_transposed_sm90a(const MatmulTransposedArgs& args, Workspace, Stream stream) {
  using namespace sm90a::transposed;
  const QuantizedView& weight = args.weight;
  const DeviceGuard guard(weight.device.index);
  // The driver's function below needs the device's context to be the thread's, which the guard leaves to the
  // thread's first launch where the device is the current one already.
  QN_CUDA_TRY(cudaSetDevice(weight.device.index));
  const GemmTransposedPlan plan = plan_gemm_transposed(
      {args.dy.rows, args.dx.cols, args.dy.cols, cluster_counts(weight.device)});
  const bool shares_activations = plan.cluster > 1 && !plan.split;
  visit_16bit_dtype(args.dx.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    GemmParams<T> params{.activations = make_tensor_map(
                             {.data = args.dy.data,
                              .elem_bytes = 2,
                              .rows = args.dy.rows,
                              .cols = args.dy.cols,
                              .stride_bytes = sm90a::row_stride_bytes(args.dy),
                              .box_rows = plan.tile_rows / (shares_activations ? plan.cluster : 1),
                              .box_cols = kStep}),
                         .codes = make_tensor_map({.data = weight.packed,
                                                   .elem_bytes = 1,
                                                   .rows = weight.rows,
                                                   .cols = weight.cols / 2,
                                                   .stride_bytes = weight.cols / 2,
                                                   .box_rows = sm90a::kPanelRows,
                                                   .box_cols = kChunkRowBytes}),
                         .values = {},
                         .scales = block_scales(weight),
                         .out = sm90a::out_matrix<T>({}, args.dx),
                         .weight_rows = static_cast<int>(weight.rows),
                         .weight_units = static_cast<int>(weight.cols / kStep),
                         .plan = plan};
    std::copy_n(weight.codebook.values, 16, params.values);
    sm90a::visit_tile_rows<16, 64, 128, 256>(plan.tile_rows, [&](auto tile_rows) {
      visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
        launch_gemm<Config<T, decltype(tile_rows)::value, decltype(double_quant)::value>>(
            weight.device.index, params, to_cuda(stream));
      });
    });
  });
}

}  // namespace qlora_native::cuda
