// What warpgroups (four warps) of a thread block do apart from each other (sm_90a).
#pragma once

namespace qlora_native::cuda {

/// A barrier of the `threads` threads that name the same `barrier`, 1 to 15; 0 is __syncthreads().
__device__ __forceinline__ void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// Raises the registers of the calling warpgroup's threads to kRegisters; waits until others have given
/// enough.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Lowers them.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace qlora_native::cuda
