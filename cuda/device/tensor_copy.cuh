// Copies of boxes of a matrix by the tensor copy engine (sm_90 and newer). The matrix and the box are
// described by a map that the host made (host/tensor_map.h); what lies outside of the matrix arrives as
// zeros.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace qlora_native::cuda {

/// Gets the map into the caches.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Starts to copy the box at (`col`, `row`) to shared memory; its bytes count at `barrier`. One thread
/// calls it.
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap& map, int col, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3}], [%4];" ::"r"(target),
      "l"(&map), "r"(col), "r"(row), "r"(barrier)
      : "memory");
}

/// The same to all thread blocks of the cluster whose bit is set in `ranks`, to the same addresses and
/// barriers of each.
__device__ __forceinline__ void copy_box_to_ranks(uint32_t target, const CUtensorMap& map, int col,
                                                  int row, uint32_t barrier, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::"
      "cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(&map), "r"(col), "r"(row), "r"(barrier), "h"(ranks)
      : "memory");
}

/// What the calling thread has written to shared memory by ordinary stores is seen by the tensor cores
/// and the copy engine, once they are told by a barrier.
__device__ __forceinline__ void publish_to_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace qlora_native::cuda
