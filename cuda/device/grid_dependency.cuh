// Kernels that start while the previous one of their stream ends. Before sm_90 they do not, and the
// wait is empty.
#pragma once

namespace qlora_native::cuda {

/// Waits until the kernels before this one in the stream are complete and what they wrote is seen.
/// A kernel launched with `LaunchShape::overlaps_previous` calls it before its first access to
/// memory that is not constant.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace qlora_native::cuda
