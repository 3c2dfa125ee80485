// out[rows, cols] = activations[rows, depth] * weight on Hopper's tensor cores (wgmma): Y[M,N] = X[M,K] * W[N,K]^T + bias
// and, from the same codes, dX[M,K] = dY[M,N] * W[N,K] (transposed). 16-bit activations, fp32 accumulation.
//
// A tile of out^T, 128 columns of out by kTokens of its rows, is the sum over steps of 64 elements of depth of
//   (two panels of 64 columns of out by the depth) * (a box of activations [kTokens, 64])^T,
// with the weight in registers: the fragments of wgmma. One lookup in a table of all bytes (PairTable) gives the pair of
// neighbours in a row of W that a byte of codes is. Forward a fragment consists of such pairs. Transposed it
// consists of pairs of neighbours in a column: two lookups make two of those (TransposedFragments).
//
// Thread block, roles by warpgroup:
//   multipliers     one panel each. Up to 64 rows there are two teams of them with every other step each, so that
//                   16 warps hide each other's latencies. Forward, values are looked up in 16 bits then, and the
//                   sums of a step are multiplied by its scales. For more rows that takes registers that there are
//                   not, and transposed the scales vary along the depth: values are looked up in more bits (ScaledValues),
//                   scaled, and rounded once.
//   copiers         two warps decode the scales, a thread brings codes and another one activations (tensor
//                   copy engine)
// Rings in shared memory: boxes (activations), chunks (codes and scales of four steps).
//
// Thread blocks have even shares of all tiles' chunks (GemmSm90aPlan). Where several share a tile, the
// first adds what the others leave in the workspace, in their order: the same arguments give the same bits. It
// waits for blocks with larger numbers, that begin with their part of that tile and wait for none before: two
// processors suffice for an end.
//
// Bound: tensor cores, 4 * kTokens clocks a step; shared memory, 300 + 3 * kTokens; where weights are scaled, 340 to
// issue instructions.
#pragma once

#include <cstdint>

#include "device/grid_dependency.cuh"
#include "device/mbarrier.cuh"
#include "device/pair_table.cuh"
#include "device/shared_memory.cuh"
#include "device/warp_uniform.cuh"
#include "device/warpgroup.cuh"
#include "gemm/sm90a/copies.cuh"
#include "gemm/sm90a/layout.cuh"
#include "gemm/sm90a/multipliers.cuh"
#include "gemm/sm90a/operands.h"
#include "gemm/sm90a/plan.h"
#include "gemm/sm90a/scaled_values.cuh"
#include "gemm/sm90a/scales.cuh"
#include "host/device_info.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/launch_number.h"
#include "host/stream.h"
#include "host/table_values.h"
#include "host/tensor_map.h"

namespace qlora_native::cuda::sm90a {

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
      return ScaledValues<typename C::Elem>::pair(p.table.values[byte >> 4],
                                                  p.table.values[byte & 15]);
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
      const int scale_thread = thread - C::kMultipliers * kWarpgroup;
      if (p.scales_are_wide) {
        decode_scales<C, true>(p, shared, block, scale_thread);
      } else {
        decode_scales<C, false>(p, shared, block, scale_thread);
      }
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
void launch_gemm(const char* name, int device, const Params<typename C::Elem>& params,
                 cudaStream_t stream) {
  const auto kernel = gemm_sm90a_kernel<C>;
  static OncePerDevice once;
  once(device, [&] { allow_shared_memory(kernel, C::kSharedBytes); });
  launch(name, kernel,
         {.grid = params.plan.grid,
          .block = C::kThreads,
          .dynamic_shared_bytes = C::kSharedBytes,
          .overlaps_previous = true},
         stream, params);
}

/// What the table is filled with, and the scales are multiplied by.
template <class C>
TableValues values_of(const Codebook& codebook, DType dtype) {
  if constexpr (C::kScalesWeights) return ScaledValues<typename C::Elem>::of(codebook);
  return table_values(codebook, dtype);
}

struct Operands {
  const MatrixView& activations;
  const QuantizedView& weight;
  const VectorView& bias;
  const MutableMatrixView& out;
};

inline GemmSm90aPlan plan_of(const Operands& args) {
  return plan_gemm_sm90a(
      {args.out.rows, args.out.cols, args.activations.cols, processor_count(args.weight.device)});
}

/// Whether the scales of `units` units that lie in one row of W from a multiple of `units` on can be loaded at once.
inline bool scales_are_wide(const QuantizedView& weight, int units) {
  return weight.block_size == kUnit && weight.cols / kUnit % units == 0 &&
         (weight.absmax.is_double_quantized() ? is_aligned(weight.absmax.codes, units)
                                              : is_aligned(weight.absmax.values, 4 * units));
}

template <bool kTransposed>
void run(const char* name, const Operands& args, Workspace workspace, Stream stream) {
  const QuantizedView& weight = args.weight;
  const DeviceGuard guard(weight.device.index);
  make_context_current(weight.device.index);
  const GemmSm90aPlan plan = plan_of(args);
  visit_16bit_dtype(args.out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_tile_rows<16, 32, 64, 128, 256>(plan.tile_rows, [&](auto tile_rows) {
      visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
        using C = Config<T, decltype(tile_rows)::value, decltype(double_quant)::value, kTransposed>;
        const Params<T> params{
            .activations = make_tensor_map({.data = args.activations.data,
                                            .elem_bytes = 2,
                                            .rows = args.activations.rows,
                                            .cols = args.activations.cols,
                                            .stride_bytes = row_stride_bytes(args.activations),
                                            .box_rows = C::kTokens,
                                            .box_cols = kStep}),
            .codes = make_tensor_map({.data = weight.packed,
                                      .elem_bytes = 1,
                                      .rows = weight.rows,
                                      .cols = weight.cols / 2,
                                      .stride_bytes = weight.cols / 2,
                                      .box_rows = C::kWeightRows,
                                      .box_cols = C::kCodeRowBytes}),
            .table = values_of<C>(weight.codebook, args.out.dtype),
            .scales = block_scales(weight),
            .out = out_matrix<T>(args.bias, args.out),
            .weight_rows = static_cast<int>(weight.rows),
            .weight_units = static_cast<int>(weight.cols / kUnit),
            .scales_are_wide = scales_are_wide(weight, C::kWeightUnits),
            .plan = plan,
            .partial_sums =
                reinterpret_cast<float4*>(static_cast<char*>(workspace.data) + plan.flag_bytes()),
            .flags = static_cast<uint64_t*>(workspace.data),
            .ready = next_launch()};
        launch_gemm<C>(name, weight.device.index, params, to_cuda(stream));
      });
    });
  });
}

}  // namespace qlora_native::cuda::sm90a
