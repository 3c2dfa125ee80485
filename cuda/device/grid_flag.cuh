// Flags in global memory by which a thread block waits for what others of the grid have written. Those that are waited
// for must come to an end without the one that waits, whether they run at the same time or not.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// Sets the flag: who sees it also sees what this thread wrote before, and what others had before a barrier and a
/// __threadfence() of theirs.
__device__ __forceinline__ void set_flag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

/// Waits until the flag has that value.
__device__ __forceinline__ void await_flag(const uint64_t* flag, uint64_t value) {
  uint64_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
  } while (found != value);
}

}  // namespace qlora_native::cuda
