// The sub-allocator: best fit, coalescing, regions apart; against a map of single units.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "qlora_native/error.h"
#include "region_allocator.h"

namespace qlora_native::testing {
namespace {

constexpr int64_t kUnit = kPagedAlignment;

/// Addresses that are never followed.
char* at(int64_t unit) { return reinterpret_cast<char*>((unit + 16) * kUnit); }

TEST(RegionAllocator, RoundsUpAndRefusesWhatCannotBeRounded) {
  EXPECT_EQ(RegionAllocator::rounded(1), kUnit);
  EXPECT_EQ(RegionAllocator::rounded(kUnit), kUnit);
  EXPECT_EQ(RegionAllocator::rounded(kUnit + 1), 2 * kUnit);
  const int64_t most = std::numeric_limits<int64_t>::max();
  try {
    RegionAllocator::rounded(most);
    FAIL();
  } catch (const OutOfMemory& error) {
    EXPECT_NE(std::string(error.what()).find(std::to_string(most)), std::string::npos);
  }
}

TEST(RegionAllocator, TakesTheSmallestPieceThatFits) {
  RegionAllocator regions;
  regions.add_region(at(0), 10 * kUnit);
  regions.add_region(at(100), 3 * kUnit);
  EXPECT_EQ(regions.allocate(3 * kUnit), at(100));
  EXPECT_EQ(regions.allocate(11 * kUnit), nullptr);
  EXPECT_EQ(regions.allocate(10 * kUnit), at(0));
  EXPECT_EQ(regions.allocate(kUnit), nullptr);
  EXPECT_EQ(regions.reserved_bytes(), 13 * kUnit);
}

TEST(RegionAllocator, JoinsFreePiecesButNotRegions) {
  RegionAllocator regions;
  regions.add_region(at(0), 4 * kUnit);
  regions.add_region(at(4), 4 * kUnit);
  std::vector<char*> pieces;
  for (int i = 0; i < 8; ++i) pieces.push_back(regions.allocate(kUnit));
  EXPECT_TRUE(regions.empty_regions().empty());
  for (char* const piece : {pieces[1], pieces[3], pieces[2], pieces[0]}) regions.free(piece, kUnit);
  ASSERT_EQ(regions.empty_regions().size(), 1u);
  EXPECT_EQ(regions.empty_regions()[0].begin, pieces[0]);
  for (int i = 4; i < 8; ++i) regions.free(pieces[static_cast<size_t>(i)], kUnit);
  EXPECT_EQ(regions.empty_regions().size(), 2u);
  EXPECT_EQ(regions.allocate(5 * kUnit), nullptr);
  regions.remove_region(at(0));
  EXPECT_EQ(regions.reserved_bytes(), 4 * kUnit);
  EXPECT_EQ(regions.allocate(4 * kUnit), at(4));
}

TEST(RegionAllocator, RandomUseAgainstAMapOfUnits) {
  constexpr int64_t kRegionUnits[] = {7, 32, 1, 60};
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    RegionAllocator regions;
    std::vector<bool> is_taken(200);  // by unit; the last unit of all is no region's
    std::vector<int> region_of(200, -1);
    int64_t total = 0;
    for (int i = 0; i < 4; ++i) {
      regions.add_region(at(total), kRegionUnits[i] * kUnit);
      std::fill_n(region_of.begin() + total, kRegionUnits[i], i);
      total += kRegionUnits[i];
    }
    struct Piece {
      int64_t unit, count;
    };
    std::vector<Piece> pieces;
    for (int i = 0; i < 2000; ++i) {
      if (!pieces.empty() && random() % 2 == 0) {
        const size_t index = random() % pieces.size();
        const Piece piece = pieces[index];
        regions.free(at(piece.unit), piece.count * kUnit);
        std::fill_n(is_taken.begin() + piece.unit, piece.count, false);
        pieces.erase(pieces.begin() + static_cast<ptrdiff_t>(index));
        continue;
      }
      const auto count = static_cast<int64_t>(1 + random() % 9);
      char* const data = regions.allocate(count * kUnit);
      if (data == nullptr) {
        // There is no run of free units that long in any region.
        int64_t run = 0;
        for (int64_t unit = 0; unit < total; ++unit) {
          const bool begins = unit == 0 || region_of[unit] != region_of[unit - 1];
          run = is_taken[unit] ? 0 : (begins ? 1 : run + 1);
          ASSERT_LT(run, count);
        }
        continue;
      }
      const int64_t unit = (data - at(0)) / kUnit;
      for (int64_t u = unit; u < unit + count; ++u) {
        ASSERT_FALSE(is_taken[u]);
        ASSERT_EQ(region_of[u], region_of[unit]);
        is_taken[u] = true;
      }
      pieces.push_back({unit, count});
    }
    for (const Piece& piece : pieces) regions.free(at(piece.unit), piece.count * kUnit);
    EXPECT_EQ(regions.empty_regions().size(), 4u);
  }
}

}  // namespace
}  // namespace qlora_native::testing
