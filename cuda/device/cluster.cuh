// Thread blocks that share their memory (sm_90 and newer).
#pragma once

#include <cstdint>

#include "device/shared_memory.cuh"

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

/// Reads shared memory of the cluster's thread block `rank`, at the address it has in this one.
__device__ __forceinline__ float load_cluster(uint32_t address, int rank, int cluster_size) {
  if (cluster_size == 1) return load_shared(address);
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
  return value;
}

}  // namespace qlora_native::cuda
