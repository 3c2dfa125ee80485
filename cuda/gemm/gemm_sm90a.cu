// Y[M,N] = X[M,K] * W[N,K]^T + bias on Hopper's tensor cores (wgmma): 16-bit activations, fp32 accumulation.
//
// A tile of Y^T, 128 columns of Y by kTokens of its rows, is the sum over steps of 64 elements of K of
//   (two panels of W, [64, 64] each) * (a box of activations [kTokens, 64])^T,
// with W in registers: the fragments of wgmma. A lane has pairs of neighbouring weights of two rows, and
// a pair is a byte of codes, so that one lookup in a table of all bytes (PairTable) gives it.
//
// Thread block, roles by warpgroup:
//   multipliers     one panel each. Up to 64 rows there are two teams of them with every other step each, so that
//                   16 warps hide each other's latencies: values are looked up in 16 bits, the sums of a step
//                   are multiplied by its scales. For more rows that takes registers that there are not: values are
//                   looked up in fixed point, scaled, and rounded once.
//   copiers         two warps decode the scales, a thread brings codes and another one activations (tensor
//                   copy engine)
// Rings in shared memory: boxes (activations), chunks (codes and scales of four steps).
//
// Thread blocks have even shares of all tiles' chunks (GemmForwardPlan). Where several share a tile, the
// first adds what the others leave in the workspace, in their order: the same arguments give the same bits. It
// waits for blocks with larger numbers, that begin with their part of that tile and wait for none before: two
// processors suffice for an end.
//
// Bound: tensor cores, 4 * kTokens clocks a step; shared memory, 300 + 3 * kTokens.
#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "device/grid_dependency.cuh"
#include "device/warp_uniform.cuh"
#include "device/warpgroup.cuh"
#include "gemm/sm90a/forward/copies.cuh"
#include "gemm/sm90a/forward/fixed_point.cuh"
#include "gemm/sm90a/forward/layout.cuh"
#include "gemm/sm90a/forward/multipliers.cuh"
#include "gemm/sm90a/forward/plan.h"
#include "gemm/sm90a/forward/scales.cuh"
#include "gemm/sm90a/operands.h"
#include "host/cluster_occupancy.h"
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
namespace sm90a::forward {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    gemm_sm90a_kernel(const __grid_constant__ Params<typename C::Elem> p) {
  extern __shared__ char dynamic_shared[];
  allow_next_kernel();
  const uint32_t window = shared_address(dynamic_shared);
  const Shared<C> shared{(window + kAlignment - 1) / kAlignment * kAlignment, kTableAt};
  // What lies before the table would reach into it.
  if (shared.base > kAlignment) __trap();
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = uniform(thread / kWarpSize);
  const int block = static_cast<int>(blockIdx.x);
  if (thread == 0) {
    prefetch_map(p.activations);
    prefetch_map(p.codes);
    for (int slot = 0; slot < C::kBoxes; ++slot) {
      init_barrier(shared.box_full(slot), 1);
      init_barrier(shared.box_empty(slot), kOwners);
    }
    for (int slot = 0; slot < C::kChunks; ++slot) {
      init_barrier(shared.chunk_full(slot), 1 + kScaleThreads);
      init_barrier(shared.chunk_empty(slot), kOwners * C::kTeams);
    }
    publish_barriers();
  }
  if (thread < 256) store_shared(shared.map() + thread * 4, kDynamicMapOnDevice.values[thread]);
  char* const table = dynamic_shared + (shared.table - window);
  if constexpr (C::kScalesWeights) {
    PairTable::fill_with(table, thread, C::kThreads, [&](int byte) {
      return fixed_point(p.table.values[byte >> 4]) | fixed_point(p.table.values[byte & 15]) << 16;
    });
  } else {
    PairTable::fill<typename C::Elem>(table, p.table.values, thread, C::kThreads);
  }
  __syncthreads();
  wait_for_previous_kernel();

  constexpr int kMultiplierWarps = C::kMultipliers * kWarpgroup / kWarpSize;
  if (warp < kMultiplierWarps) {
    take_registers<C::kMultiplierRegisters>();
    multiply<C>(p, shared, block, warp / 4, thread % kWarpgroup);
  } else {
    give_registers<C::kCopierRegisters>();
    const int copier = warp - kMultiplierWarps;
    if (copier < 2) {
      decode_scales<C>(p, shared, block, thread - C::kMultipliers * kWarpgroup);
    } else if (thread % kWarpSize == 0) {
      if (copier == 2) {
        copy_codes<C>(p, shared, block);
      } else {
        copy_boxes<C>(p, shared, block);
      }
    }
  }
}

template <class C>
void launch_gemm(int device, const Params<typename C::Elem>& params, cudaStream_t stream) {
  const auto kernel = gemm_sm90a_kernel<C>;
  static OncePerDevice once;
  once(device, [&] { allow_shared_memory(kernel, C::kSharedBytes); });
  launch("matmul_4bit gemm_sm90a", kernel,
         {.grid = params.plan.grid,
          .block = C::kThreads,
          .dynamic_shared_bytes = C::kSharedBytes,
          .overlaps_previous = true},
         stream, params);
}

/// What the table is filled with, and the scales are multiplied by.
template <class C>
TableValues values_of(const Codebook& codebook, DType dtype) {
  if (!C::kScalesWeights) return table_values(codebook, dtype);
  TableValues table{};
  std::copy_n(codebook.values, 16, table.values);
  table.scale_inverse = 1.0f / kFixedOne;
  return table;
}

GemmForwardPlan plan_of(const MatmulArgs& args) {
  return plan_gemm_forward(
      {args.x.rows, args.y.cols, args.x.cols, cluster_counts(args.weight.device).of[1]});
}

}  // namespace sm90a::forward

bool is_gemm_sm90a_usable(Device device, std::string* why_not) {
  return is_usable(device, why_not) && is_hopper(device, why_not) &&
         has_hopper_resources(device, sm90a::kMaxSharedBytes, why_not);
}

bool supports_gemm_sm90a(const MatmulArgs& args, std::string* why_not) {
  return supports_mma(args, sm90a::kMaxExtent, why_not) &&
         sm90a::fits(args.x, args.y.cols, why_not);
}

bool prefers_gemm_sm90a(const MatmulArgs& args) {
  return gemm_forward_is_preferred(args.x.rows, args.x.cols);
}

bool dense_beats_gemm_sm90a(const MatmulArgs& args) {
  return !gemm_forward_beats_dense(args.x.rows);
}

int64_t gemm_sm90a_workspace_bytes(const MatmulArgs& args) {
  return gemm_forward_workspace_bytes(sm90a::forward::plan_of(args));
}

void gemm_sm90a(const MatmulArgs& args, Workspace workspace, Stream stream) {
  using namespace sm90a::forward;
  const QuantizedView& weight = args.weight;
  const DeviceGuard guard(weight.device.index);
  // The driver's function below needs the device's context to be the thread's, which the guard leaves to the
  // thread's first launch where the device is the current one already.
  QN_CUDA_TRY(cudaSetDevice(weight.device.index));
  const GemmForwardPlan plan = plan_of(args);
  const int64_t units = weight.cols / kStep;
  const BlockScales scales = block_scales(weight);
  const bool wide = weight.block_size == kStep && units % kChunkSteps == 0 &&
                    (weight.absmax.is_double_quantized() ? is_aligned(scales.codes, 4)
                                                         : is_aligned(scales.values, 16));
  visit_16bit_dtype(args.y.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Params<T> params{
        .activations = make_tensor_map({.data = args.x.data,
                                        .elem_bytes = 2,
                                        .rows = args.x.rows,
                                        .cols = args.x.cols,
                                        .stride_bytes = sm90a::row_stride_bytes(args.x),
                                        .box_rows = plan.tile_rows,
                                        .box_cols = kStep}),
        .codes = make_tensor_map({.data = weight.packed,
                                  .elem_bytes = 1,
                                  .rows = weight.rows,
                                  .cols = weight.cols / 2,
                                  .stride_bytes = weight.cols / 2,
                                  .box_rows = kTileCols,
                                  .box_cols = kCodeRowBytes}),
        .table = {},
        .scales = scales,
        .out = sm90a::out_matrix<T>(args.bias, args.y),
        .weight_rows = static_cast<int>(weight.rows),
        .weight_units = static_cast<int>(units),
        .scales_are_wide = wide,
        .plan = plan,
        .partial_sums = reinterpret_cast<float4*>(static_cast<char*>(workspace.data) +
                                                  gemm_forward_flag_bytes(plan)),
        .flags = static_cast<uint64_t*>(workspace.data),
        .ready = next_launch()};
    sm90a::visit_tile_rows<16, 32, 64, 128, 256>(plan.tile_rows, [&](auto tile_rows) {
      visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
        using C = Config<T, decltype(tile_rows)::value, decltype(double_quant)::value>;
        params.table = values_of<C>(weight.codebook, args.y.dtype);
        launch_gemm<C>(weight.device.index, params, to_cuda(stream));
      });
    });
  });
}

}  // namespace qlora_native::cuda
