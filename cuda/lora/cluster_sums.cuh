// Tiles that warps have summed parts of, in the shared memory of a cluster's thread blocks.
#pragma once

#include <cstdint>

#include "device/cluster.cuh"
#include "device/shared_memory.cuh"

namespace qlora_native::cuda {

/// Four floats at `address`, a multiple of 16, of the cluster's thread block `rank`. Clusters are
/// for sm_90 and newer.
__device__ __forceinline__ float4 load_part4(uint32_t address, int rank, int cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) return load_cluster4(address, rank);
#endif
  const uint4 words = load_shared4(address);
  return make_float4(__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
                     __uint_as_float(words.w));
}

/// As cluster_sync, where there may be no clusters.
__device__ __forceinline__ void sync_blocks(int cluster) {
#if __CUDA_ARCH__ >= 900
  cluster_sync(cluster);
#else
  __syncthreads();
#endif
}

/// Adds four neighbouring floats of a tile over the warps of all thread blocks, in their order. A
/// warp's part of the tile is `kPartBytes` behind that of the warp before.
template <int kWarps, int kPartBytes>
__device__ __forceinline__ float4 sum_parts4(uint32_t address, int cluster) {
  float4 sum = make_float4(0, 0, 0, 0);
  for (int rank = 0; rank < cluster; ++rank) {
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float4 part = load_part4(address + warp * kPartBytes, rank, cluster);
      sum.x += part.x;
      sum.y += part.y;
      sum.z += part.z;
      sum.w += part.w;
    }
  }
  return sum;
}

}  // namespace qlora_native::cuda
