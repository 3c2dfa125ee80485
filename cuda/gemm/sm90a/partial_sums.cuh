// How thread blocks of kernel.cuh that share a tile bring their sums together.
#pragma once

#include <cstdint>

#include "device/grid_flag.cuh"
#include "gemm/sm90a/layout.cuh"

namespace qlora_native::cuda::sm90a {

template <class C>
__device__ __forceinline__ float4* partial_sums_of(const Params<typename C::Elem>& p, int block,
                                                   int warp, int lane) {
  return p.partial_sums +
         (static_cast<int64_t>(block) * (C::kSums / 4) * kOwners + warp) * kWarpSize + lane;
}

/// Gives a warp's sums to the thread block that began the tile.
template <class C>
__device__ __forceinline__ void give_sums(const Params<typename C::Elem>& p, int block, int warp,
                                          int lane, const float (&sums)[C::kSums]) {
  float4* const target = partial_sums_of<C>(p, block, warp, lane);
#pragma unroll
  for (int i = 0; i < C::kSums / 4; ++i) {
    __stcg(target + i * kOwners * kWarpSize,
           make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
  }
  __threadfence();
  __syncwarp();
  if (lane == 0) set_flag(p.flags + block * kOwners + warp, p.ready);
}

/// Adds what thread block `block` has given.
template <class C>
__device__ __forceinline__ void take_sums(const Params<typename C::Elem>& p, int block, int warp,
                                          int lane, float (&sums)[C::kSums]) {
  uint64_t* const flag = p.flags + block * kOwners + warp;
  await_flag(flag, p.ready);
  __syncwarp();
  if (lane == 0) *flag = 0;  // a replay of a CUDA graph waits for the same number again
  const float4* const source = partial_sums_of<C>(p, block, warp, lane);
#pragma unroll
  for (int i = 0; i < C::kSums / 4; ++i) {
    const float4 part = __ldcg(source + i * kOwners * kWarpSize);
    sums[4 * i] += part.x;
    sums[4 * i + 1] += part.y;
    sums[4 * i + 2] += part.z;
    sums[4 * i + 3] += part.w;
  }
}

}  // namespace qlora_native::cuda::sm90a
