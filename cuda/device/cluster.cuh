// Thread blocks that share their memory (sm_90 and newer).
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// A barrier of all threads of the cluster: what they wrote to shared memory is seen after it. For
/// a cluster of one thread block that is __syncthreads().
__device__ __forceinline__ void cluster_sync(int cluster_size) {
  if (cluster_size > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  } else {
    __syncthreads();
  }
}

/// Four floats of the cluster's thread block `rank`, at the address they have in this one, a multiple
/// of 16.
__device__ __forceinline__ float4 load_cluster4(uint32_t address, int rank) {
  float4 value;
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];}"
      : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

}  // namespace qlora_native::cuda
