// Kernels that start while the previous one of their stream ends. Before sm_90 they do not, and the
// wait is empty.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// Waits until the kernels before this one in the stream are complete and what they wrote is seen.
/// A kernel launched with `LaunchShape::overlaps_previous` calls it before its first access to
/// memory that is not constant (other than `prefetch_l2`), and reads that by copies (cp.async, bulk) or by what follows:
/// __ldg and ld.global.nc are for what nobody writes while the kernel runs, and the compiler moves
/// them up across the wait.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel of the stream, if it overlaps this one, take a processor as soon as a thread
/// block leaves it, not after the last one has. What that kernel does before its wait is then free.
/// The kernel that calls it waits, too, and so does every kernel that overlaps: by its wait the next
/// one waits for all that this one has waited for. Before that it may run beside kernels further back.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Volatile and with a clobber of memory: they stay behind the wait.

__device__ __forceinline__ float load_after_wait(const float* source) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(source) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_after_wait(const uint8_t* source) {
  uint32_t value;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_after_wait(const uint32_t* source) {
  uint32_t value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}

/// An element of a 16-bit type.
template <class T>
__device__ __forceinline__ T load_after_wait(const T* source) {
  static_assert(sizeof(T) == 2);
  uint16_t bits;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(source) : "memory");
  return *reinterpret_cast<const T*>(&bits);
}

__device__ __forceinline__ uint4 load_after_wait(const uint4* source) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source)
               : "memory");
  return value;
}

__device__ __forceinline__ uint2 load_after_wait(const uint2* source) {
  uint2 value;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(source)
               : "memory");
  return value;
}

/// For what is read once: it does not displace what the L1 cache is used for.
__device__ __forceinline__ uint4 load_streaming_after_wait(const uint4* source) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source)
               : "memory");
  return value;
}

}  // namespace qlora_native::cuda
