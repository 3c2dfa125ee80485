// Sub-allocation of large regions: best fit, coalescing. Addresses only; the memory is not touched.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "qlora_native/memory.h"

namespace qlora_native {

class RegionAllocator {
 public:
  /// Rounds up to kPagedAlignment; throws OutOfMemory when that is more than an int64_t holds.
  static int64_t rounded(int64_t size_bytes);

  /// `begin` is aligned to kPagedAlignment, `size_bytes` a positive multiple of it.
  void add_region(char* begin, int64_t size_bytes);

  /// Forgets a region of which nothing is allocated.
  void remove_region(char* begin);

  /// The smallest free piece that holds `size_bytes` (rounded, positive), cut to size; null when
  /// there is none.
  char* allocate(int64_t size_bytes);

  /// Takes back what `allocate` gave for `size_bytes`.
  void free(char* data, int64_t size_bytes);

  struct Region {
    char* begin;
    int64_t size_bytes;
  };
  /// Regions of which nothing is allocated.
  std::vector<Region> empty_regions() const;
  std::vector<Region> regions() const;
  int64_t reserved_bytes() const { return reserved_bytes_; }

 private:
  void insert(char* begin, int64_t size_bytes);
  void erase(std::map<char*, int64_t>::iterator piece);

  std::map<char*, int64_t> regions_;                ///< begin -> bytes
  std::map<char*, int64_t> free_;                   ///< pieces, begin -> bytes
  std::set<std::pair<int64_t, char*>> free_sizes_;  ///< the same, by size
  int64_t reserved_bytes_ = 0;
};

}  // namespace qlora_native
