// Fragments of mma.sync from codes, by a table of pairs.
#pragma once

#include <cstdint>

#include "device/pair_table.cuh"

namespace qlora_native::cuda {

/// The fragment of A for product `j` (0 to 3, a compile-time constant) of four mma_m16n8k16 whose order of k is the
/// lanes' own: a lane has 16 consecutive codes of row g, `low`, and of row g + 8, `high`.
__device__ __forceinline__ void look_up_fragment(const PairTable& table, uint2 low, uint2 high,
                                                 int j, uint32_t (&a)[4]) {
  const uint32_t low_word = j < 2 ? low.x : low.y;
  const uint32_t high_word = j < 2 ? high.x : high.y;
  const int byte = j % 2 * 2;
  a[0] = table.look_up(low_word, byte);
  a[1] = table.look_up(high_word, byte);
  a[2] = table.look_up(low_word, byte + 1);
  a[3] = table.look_up(high_word, byte + 1);
}

}  // namespace qlora_native::cuda
