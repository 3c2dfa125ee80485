// The search of a dynamic 8-bit map. It reads at random: its table belongs into shared memory.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// The code of a float in one of the buckets of a NearestCodeTable (cpp/src/nearest_code.h).
template <class Table>
__device__ __forceinline__ uint32_t code_in_bucket(const Table& table, float x, int32_t bucket) {
  const uint32_t sign = Table::kSigns == 2 ? __float_as_uint(x) >> 31 : 0;
  const uint32_t rank = table.ranks[static_cast<int32_t>(sign) * Table::kBuckets + bucket];
  return rank + (x > table.points[rank] ? 1 : 0);
}

/// encode_dynamic by one comparison. The code of a NaN is some code.
template <class Table>
__device__ __forceinline__ uint32_t find_code(const Table& table, float x) {
  return code_in_bucket(table, x, Table::bucket(__float_as_uint(x) & 0x7fffffffu));
}

/// find_code of a finite float that is at most 1 in magnitude, but for rounding.
template <class Table>
__device__ __forceinline__ uint32_t find_scaled_code(const Table& table, float x) {
  const uint32_t magnitude = __float_as_uint(x) & 0x7fffffffu;
  const int32_t index = max(static_cast<int32_t>(magnitude >> Table::kShift), Table::kLowest);
  return code_in_bucket(table, x, index - Table::kLowest);
}

}  // namespace qlora_native::cuda
