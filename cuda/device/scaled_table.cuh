// Sixteen scaled values in eight registers, looked up four at a time by byte permutations.
#pragma once

#include <cstdint>

#include "device/pair_table.cuh"

namespace qlora_native::cuda {

/// The products of the sixteen code values with one scale, rounded once to a 16-bit type, their lower and
/// upper bytes apart: what a thread decodes a block of 64 with. 21 instructions for eight codes and
/// 32 for the table.
class ScaledTable {
 public:
  template <class T>
  __device__ static __forceinline__ ScaledTable make(const float (&values)[16], float scale) {
    ScaledTable table;
    // Opaque to the compiler, which would turn them into other instructions.
    asm("mov.u32 %0, 0x32103210;" : "=r"(table.order_));
    asm("mov.u32 %0, 0x10000;" : "=r"(table.shift_));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = pack_pair<T>(values[4 * i] * scale, values[4 * i + 1] * scale);
      const uint32_t second = pack_pair<T>(values[4 * i + 2] * scale, values[4 * i + 3] * scale);
      table.low_[i] = __byte_perm(first, second, 0x6420);
      table.high_[i] = __byte_perm(first, second, 0x7531);
    }
    return table;
  }

  /// The eight values of four bytes of codes, in their order.
  __device__ __forceinline__ uint4 decode(uint32_t word) const {
    // A permutation selects by three bits: one from each half of the table, then one of the two by
    // the code's fourth bit.
    const uint32_t entry = word & 0x77777777u;
    uint32_t half;  // (word >> 1 & 0x44444444) | 0x32103210
    asm("lop3.b32 %0, %1, %2, %3, 0xea;"
        : "=r"(half)
        : "r"(word >> 1), "r"(0x44444444), "r"(order_));
    const uint2 first = decode4(entry, half);
    const uint2 second = decode4(upper_half(entry), upper_half(half));
    return make_uint4(first.x, first.y, second.x, second.y);
  }

 private:
  /// __byte_perm() for selectors below 8, without the instructions that would make them so.
  __device__ static __forceinline__ uint32_t permute(uint32_t first, uint32_t second,
                                                     uint32_t selectors) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(first), "r"(second), "r"(selectors));
    return bytes;
  }

  /// x >> 16 by the multipliers' pipe: that of shifts and permutations is the bottleneck.
  __device__ __forceinline__ uint32_t upper_half(uint32_t x) const { return __umulhi(x, shift_); }

  __device__ __forceinline__ uint2 decode4(uint32_t entry, uint32_t half) const {
    const uint32_t low =
        permute(permute(low_[0], low_[1], entry), permute(low_[2], low_[3], entry), half);
    const uint32_t high =
        permute(permute(high_[0], high_[1], entry), permute(high_[2], high_[3], entry), half);
    // The first element of a byte is its upper nibble: nibbles are in the order 1, 0, 3, 2.
    return make_uint2(permute(low, high, 0x4051), permute(low, high, 0x6273));
  }

  uint32_t order_;
  uint32_t shift_;
  uint32_t low_[4];
  uint32_t high_[4];
};

}  // namespace qlora_native::cuda
