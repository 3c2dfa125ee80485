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

}  // namespace qlora_native::cuda
