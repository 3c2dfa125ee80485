// Which of many arrays a thread block works on.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// The record of a table in the kernel's parameters to which a chunk belongs: the last one whose
/// `first_chunk` is not above it. The table has `count` > 0 records, ascending.
template <class Table>
__device__ __forceinline__ const auto& record_of_chunk(const Table& table, uint32_t chunk) {
  int low = 0;
  int high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.records[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return table.records[low];
}

}  // namespace qlora_native::cuda
