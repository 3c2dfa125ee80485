// The search of a dynamic 8-bit map. It reads at random: its table belongs into shared memory.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// encode_dynamic by one comparison. `Table` is a NearestCodeTable (cpp/src/nearest_code.h). The
/// code of a NaN is some code.
template <class Table>
__device__ __forceinline__ uint32_t find_code(const Table& table, float x) {
  const uint32_t bits = __float_as_uint(x);
  const int32_t row = Table::kSigns == 2 && (bits >> 31) != 0 ? Table::kBuckets : 0;
  const uint32_t rank = table.ranks[row + Table::bucket(bits & 0x7fffffffu)];
  return rank + (x > table.points[rank] ? 1 : 0);
}

}  // namespace qlora_native::cuda
