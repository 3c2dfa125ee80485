// The end of a pass of gemm_mma.cuh: from sums in shared memory to rows of Y, or to the workspace and from there.
#pragma once

#include <cstdint>

#include "device/grid_dependency.cuh"
#include "device/grid_flag.cuh"
#include "device/shared_memory.cuh"
#include "device/vec_load.cuh"
#include "gemm/gemm_mma_layout.cuh"

namespace qlora_native::cuda::gemm_mma_kernels {

/// A thread block's tiles whose sums are complete.
struct Pass {
  int slab;
  int part;
  int number;  ///< of the part's passes
  int first_tile;
  int end_tile;
};

/// Slab 0 adds the others' sums, in their order, and the bias, and writes Y. The other slabs leave theirs to it. All
/// threads of the block call it behind a barrier; it ends with one.
template <class T, int kGroups>
__device__ __forceinline__ void write_pass(const GemmMmaParams<T>& p, const Pass& pass,
                                           uint32_t sums_at, int thread) {
  using Step = StepOf<kGroups>;
  const auto& plan = p.plan;
  const int rows = (pass.end_tile - pass.first_tile) * kTileRows;
  const int cols = plan.sums_cols();
  const int first_col = pass.first_tile * kTileRows;
  const auto partial_sums = [&](int of_slab, int token, int row) {
    return reinterpret_cast<float4*>(p.partial_sums +
                                     (static_cast<int64_t>(of_slab - 1) * p.m + token) * cols +
                                     first_col + row);
  };
  const int passes = plan.passes();
  const auto flag = [&](int of_slab) {
    return p.flags + (static_cast<int64_t>(of_slab - 1) * plan.parts + pass.part) * passes +
           pass.number;
  };
  if (pass.slab == 0 && plan.slabs > 1) {
    for (int other = 1 + thread; other < plan.slabs; other += kThreads) {
      await_flag(flag(other), p.ready);
      *flag(other) = 0;  // a replay of a CUDA graph waits for the same number again
    }
    __syncthreads();
  }
  // Four neighbouring columns at a time.
  const int quads = rows / 4;
  for (int i = thread; i < quads * p.m; i += kThreads) {
    const int token = i / quads;
    const int row = (i - token * quads) * 4;
    const uint32_t step_sums = sums_at + row / Step::kRows * (Fragments::kElements * 4);
    float sum[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[j] = load_shared(step_sums + Fragments::element_of(row % Step::kRows + j, token) * 4);
    }
    if (pass.slab > 0) {
      __stcg(partial_sums(pass.slab, token, row), make_float4(sum[0], sum[1], sum[2], sum[3]));
      continue;
    }
    for (int first = 1; first < plan.slabs; first += kSlabsAtOnce) {
      float4 parts[kSlabsAtOnce];
#pragma unroll
      for (int j = 0; j < kSlabsAtOnce; ++j) {
        parts[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + j < plan.slabs) parts[j] = __ldcg(partial_sums(first + j, token, row));
      }
#pragma unroll
      for (const float4& of_slab : parts) {
        sum[0] += of_slab.x;
        sum[1] += of_slab.y;
        sum[2] += of_slab.z;
        sum[3] += of_slab.w;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = first_col + row + j;
      if (col >= p.n) break;
      if (p.bias != nullptr) sum[j] += to_float(load_after_wait(p.bias + col));
      p.y[token * p.y_stride + col] = from_float<T>(sum[j]);
    }
  }
  if (pass.slab > 0) __threadfence();
  __syncthreads();
  if (pass.slab > 0 && thread == 0) set_flag(flag(pass.slab), p.ready);
}

}  // namespace qlora_native::cuda::gemm_mma_kernels
