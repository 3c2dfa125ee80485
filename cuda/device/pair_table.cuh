// Both values of a byte of codes by one read of shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace qlora_native::cuda {

/// Two 16-bit values in a register, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

/// For every byte of codes the pair of its values in a 16-bit type, once for each lane of a warp:
/// the pair of `byte` for lane l lies at address + kStride * byte + 4 * l. All lanes read different
/// banks, whatever their bytes. The 128 bytes after each entry are the kernel's own.
///
/// The table is aligned to 64 KB in the window of shared memory: one byte permutation makes an address.
struct PairTable {
  static constexpr uint32_t kStride = 256;
  static constexpr uint32_t kBytes = 256 * kStride;

  uint32_t lane_address;  ///< of entry 0 for this lane

  __device__ __forceinline__ PairTable(uint32_t table_address, int lane)
      : lane_address(table_address + static_cast<uint32_t>(lane) * 4) {}

  /// All threads of the block fill it; a __syncthreads() must follow.
  template <class T>
  __device__ static __forceinline__ void fill(char* table, const float (&values)[16], int thread,
                                              int threads) {
    fill_with(table, thread, threads,
              [&](int byte) { return pack_pair<T>(values[byte >> 4], values[byte & 15]); });
  }

  /// The same with the words that `pair_of(byte)` returns.
  template <class PairOf>
  __device__ static __forceinline__ void fill_with(char* table, int thread, int threads,
                                                   const PairOf& pair_of) {
    // Two neighbouring threads write the 128 bytes of an entry, in an order in which eight lanes
    // always meet different banks.
    for (int i = thread; i < 256 * 2; i += threads) {
      const int byte = i / 2;
      const uint32_t pair = pair_of(byte);
      char* const half = table + byte * kStride + i % 2 * 64;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        *reinterpret_cast<uint4*>(half + (j + byte) % 4 * 16) = make_uint4(pair, pair, pair, pair);
      }
    }
  }

  /// The pair of byte 0..3 (a compile-time constant) of `word`.
  __device__ __forceinline__ uint32_t look_up(uint32_t word, int byte) const {
    const uint32_t at = __byte_perm(word, lane_address, 0x7604 | byte << 4);
    uint32_t pair;
    // Volatile keeps it behind the barrier that follows the filling.
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at));
    return pair;
  }
};

}  // namespace qlora_native::cuda
