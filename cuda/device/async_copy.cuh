// Copies between global and shared memory that nobody waits for at once.
#pragma once

#include <cstdint>

#include "device/shared_memory.cuh"
#include "device/warp_reduce.cuh"

namespace qlora_native::cuda {

/// Starts a copy of 16 bytes to shared memory, past the L1 cache. Both addresses are 16-byte
/// aligned.
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(source) : "memory");
}

__device__ __forceinline__ void copy_async_16(void* shared, const void* source) {
  copy_async_16(shared_address(shared), source);
}

/// The same where `wanted`; elsewhere nothing happens. The L2 cache is asked for the whole 128 bytes around the source: for
/// what is read piece by piece.
__device__ __forceinline__ void copy_async_16_of_line_if(uint32_t shared, const void* source,
                                                         bool wanted) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %2, 0;\n\t"
      "@p cp.async.cg.shared.global.L2::128B [%0], [%1], 16;}" ::"r"(shared),
      "l"(source), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

/// The same where `wanted`, of which only the first `bytes` are read; zeros follow.
__device__ __forceinline__ void copy_async_up_to_16_if(uint32_t shared, const void* source,
                                                       int bytes, bool wanted) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %3, 0;\n\t"
      "@p cp.async.cg.shared.global [%0], [%1], 16, %2;}" ::"r"(shared),
      "l"(source), "r"(bytes), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

/// The same, of which only the first `bytes` are read; zeros follow. `source` is a valid address even
/// for none.
__device__ __forceinline__ void copy_async_up_to_16(uint32_t shared, const void* source,
                                                    int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source),
               "r"(bytes)
               : "memory");
}

/// The same; writes zeros and reads nothing unless `source_exists`.
__device__ __forceinline__ void copy_async_16_or_zeros(uint32_t shared, const void* source,
                                                       bool source_exists) {
  copy_async_up_to_16(shared, source, source_exists ? 16 : 0);
}

/// Closes a group of the thread's copies.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most `kPending` of the thread's latest groups are not complete. Other threads
/// need a barrier after it.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Stores `kBytes` (a multiple of 512) that the lanes of a warp have written to shared memory; all
/// of them call it, both addresses are 16-byte aligned, and `source` stays as it is until the thread
/// block ends. On sm_90 one bulk copy, which arrives in whole lines and takes no registers;
/// `evict_first` then tells the L2 cache that nobody will read the target soon.
template <int kBytes>
__device__ __forceinline__ void store_by_warp(void* target, const void* source, bool evict_first) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#if __CUDA_ARCH__ >= 900
  // What this lane wrote must be seen by the copy engine.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (lane != 0) return;
  const uint32_t address = shared_address(source);
  if (evict_first) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(
            target),
        "r"(address), "n"(kBytes), "l"(policy)
        : "memory");
  } else {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
                 "r"(address), "n"(kBytes)
                 : "memory");
  }
  // The thread block must not give up its memory before it has been read.
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#else
  static_cast<void>(evict_first);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kBytes / 512; ++i) {
    static_cast<uint4*>(target)[i * kWarpSize + lane] =
        static_cast<const uint4*>(source)[i * kWarpSize + lane];
  }
#endif
}

// Bulk copies: sm_90 and newer.

/// Starts a copy of `bytes` (a multiple of 16) by the copy engine, which tells `barrier`. All addresses
/// are 16-byte aligned.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* source, int bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

/// Asks for all or most of `bytes` at `source` to be brought into the L2 cache: whole units of 16 of
/// them. Also before `wait_for_previous_kernel`: what is written meanwhile is written there.
__device__ __forceinline__ void prefetch_l2(const void* source, uint32_t bytes) {
  const auto address = reinterpret_cast<uint64_t>(source);
  const uint32_t length = (bytes + static_cast<uint32_t>(address % 16)) / 16 * 16;
  if (length == 0) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address / 16 * 16), "r"(length));
}

}  // namespace qlora_native::cuda
