// Barriers in shared memory that count threads and bytes on their way (sm_90 and newer). A barrier is
// 8 bytes, aligned to as many; it is named by its 32-bit address.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

inline constexpr uint32_t kBarrierBytes = 8;

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// What the calling thread has initialized is seen by the copy engine and by other thread blocks of
/// the cluster, once they have met at a barrier of another kind.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrives, and lets the barrier wait for `bytes` more.
__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

/// Waits for the end of the barrier's phase number `parity` modulo 2. At once for parity 1 of a
/// barrier that has just been initialized.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/// Position in a ring of `kSlots` slots that are used in turn. Cheapest for powers of two.
template <int kSlots>
struct RingPosition {
  uint32_t count = 0;

  __device__ __forceinline__ int slot() const { return static_cast<int>(count % kSlots); }
  /// How often it went around, modulo 2.
  __device__ __forceinline__ uint32_t round() const { return count / kSlots % 2; }
};

}  // namespace qlora_native::cuda
