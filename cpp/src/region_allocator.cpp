#include "region_allocator.h"

#include <iterator>
#include <limits>
#include <string>

#include "qlora_native/error.h"

namespace qlora_native {

int64_t RegionAllocator::rounded(int64_t size_bytes) {
  // Of two alignments one is for rounding, one for the gap that some regions have behind them.
  if (size_bytes > std::numeric_limits<int64_t>::max() - 2 * kPagedAlignment) {
    throw OutOfMemory("there cannot be an allocation of " + std::to_string(size_bytes) + " bytes");
  }
  return (size_bytes + kPagedAlignment - 1) / kPagedAlignment * kPagedAlignment;
}

void RegionAllocator::add_region(char* begin, int64_t size_bytes) {
  regions_.emplace(begin, size_bytes);
  try {
    insert(begin, size_bytes);
  } catch (...) {
    regions_.erase(begin);
    throw;
  }
  reserved_bytes_ += size_bytes;
}

void RegionAllocator::remove_region(char* begin) {
  const auto region = regions_.find(begin);
  erase(free_.find(begin));
  reserved_bytes_ -= region->second;
  regions_.erase(region);
}

char* RegionAllocator::allocate(int64_t size_bytes) {
  const auto best = free_sizes_.lower_bound({size_bytes, nullptr});
  if (best == free_sizes_.end()) return nullptr;
  const auto [piece_bytes, begin] = *best;
  // The rest goes in first: what throws leaves the free pieces as they were.
  if (piece_bytes > size_bytes) insert(begin + size_bytes, piece_bytes - size_bytes);
  erase(free_.find(begin));
  return begin;
}

void RegionAllocator::free(char* data, int64_t size_bytes) {
  // Pieces of neighbouring regions stay apart: each region is given back on its own.
  const auto region = std::prev(regions_.upper_bound(data));
  const auto next = free_.lower_bound(data);
  const bool joins_next = next != free_.end() && next->first == data + size_bytes &&
                          next->first != region->first + region->second;
  const auto previous = next == free_.begin() ? free_.end() : std::prev(next);
  const bool joins_previous = previous != free_.end() && data != region->first &&
                              previous->first + previous->second == data;
  if (!joins_previous && !joins_next) return insert(data, size_bytes);
  // A joined piece takes the place of the one that it grows from: that needs no memory.
  const auto grown = joins_previous ? previous : next;
  char* const begin = joins_previous ? previous->first : data;
  int64_t total = size_bytes + grown->second;
  auto by_size = free_sizes_.extract({grown->second, grown->first});
  auto by_address = free_.extract(grown);
  if (joins_previous && joins_next) {
    total += next->second;
    erase(next);
  }
  by_size.value() = {total, begin};
  by_address.key() = begin;
  by_address.mapped() = total;
  free_sizes_.insert(std::move(by_size));
  free_.insert(std::move(by_address));
}

std::vector<RegionAllocator::Region> RegionAllocator::empty_regions() const {
  std::vector<Region> empty;
  for (const auto& [begin, size_bytes] : regions_) {
    const auto piece = free_.find(begin);
    if (piece != free_.end() && piece->second == size_bytes) empty.push_back({begin, size_bytes});
  }
  return empty;
}

std::vector<RegionAllocator::Region> RegionAllocator::regions() const {
  std::vector<Region> all;
  for (const auto& [begin, size_bytes] : regions_) all.push_back({begin, size_bytes});
  return all;
}

void RegionAllocator::insert(char* begin, int64_t size_bytes) {
  const auto piece = free_.emplace(begin, size_bytes).first;
  try {
    free_sizes_.emplace(size_bytes, begin);
  } catch (...) {
    free_.erase(piece);
    throw;
  }
}

void RegionAllocator::erase(std::map<char*, int64_t>::iterator piece) {
  free_sizes_.erase({piece->second, piece->first});
  free_.erase(piece);
}

}  // namespace qlora_native
