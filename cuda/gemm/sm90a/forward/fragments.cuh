// From codes to the fragments of W that wgmma takes from registers.
#pragma once

#include <cstdint>

#include "device/shared_memory.cuh"
#include "gemm/sm90a/forward/layout.cuh"

namespace qlora_native::cuda::sm90a::forward {

/// A lane's view of a chunk. Of a step it has two rows of its warp's 16, lane / 4 and lane / 4 + 8, and of every
/// eight weights of them the pair lane % 4: a byte of each of the row's eight words, which
/// the four lanes of a row all read. Reading bytes would take as long; two lanes read at a time what is the same.
struct Fragments {
  uint32_t row_at;        ///< of the first row, in a chunk
  uint32_t swizzle;       ///< of its pieces of 16 bytes
  uint32_t lane_address;  ///< of the table's first entry
  uint32_t selector;      ///< makes an entry's address of a word and `lane_address`

  __device__ __forceinline__ static Fragments of(uint32_t table, int row, int lane) {
    return {static_cast<uint32_t>(row * kCodeRowBytes), static_cast<uint32_t>(lane / 4 * 16),
            table + lane * 4, 0x7604u | static_cast<uint32_t>(lane % 4) << 4};
  }

  /// The codes of a step: the first half of both rows, then the second.
  __device__ __forceinline__ void load(uint32_t codes, int step, uint4 (&words)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = codes + row_at + (((2 * step + half) * 16) ^ swizzle);
      words[2 * half] = load_shared4(at);
      words[2 * half + 1] = load_shared4(at + 8 * kCodeRowBytes);
    }
  }

  /// Their entries in the order of wgmma's fragments.
  __device__ __forceinline__ void look_up(const uint4 (&words)[4], uint32_t (&pairs)[16]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 low = words[2 * half];
      const uint4 high = words[2 * half + 1];
      uint32_t* const part = pairs + 8 * half;
      part[0] = look_up(low.x);
      part[1] = look_up(high.x);
      part[2] = look_up(low.y);
      part[3] = look_up(high.y);
      part[4] = look_up(low.z);
      part[5] = look_up(high.z);
      part[6] = look_up(low.w);
      part[7] = look_up(high.w);
    }
  }

 private:
  __device__ __forceinline__ uint32_t look_up(uint32_t word) const {
    const uint32_t at = __byte_perm(word, lane_address, selector);
    uint32_t pair;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at));
    return pair;
  }
};

}  // namespace qlora_native::cuda::sm90a::forward
