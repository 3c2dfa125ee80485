// A table that makes the search of the dynamic 8-bit map one comparison. Used by every backend.
#pragma once

#include <cstdint>

#include "qlora_native/codebook.h"

namespace qlora_native {

/// Where to start looking for the nearest entry: floats are sorted into buckets by sign, exponent
/// and the top six bits of the mantissa, each narrow enough to hold at most one decision point.
struct StartingRanks {
  static constexpr int kShift = 17;                    ///< leaves six bits of the mantissa
  static constexpr int32_t kLowest = (127 - 20) << 6;  ///< 2^-20: all below share a bucket
  static constexpr int32_t kBuckets = (20 << 6) + 1;   ///< the last begins at 1
  uint8_t ranks[2][kBuckets] = {};                     ///< rank of a bucket's lowest float

  static constexpr int32_t bucket(uint32_t magnitude_bits) {
    const int32_t index = static_cast<int32_t>(magnitude_bits >> kShift) - kLowest;
    return index < 0 ? 0 : index < kBuckets ? index : kBuckets - 1;
  }
};

constexpr StartingRanks starting_ranks() {
  StartingRanks table;
  for (int32_t i = 0; i < StartingRanks::kBuckets; ++i) {
    const auto first = static_cast<uint32_t>(i == 0 ? 0 : i + StartingRanks::kLowest);
    const auto last = static_cast<uint32_t>(i + StartingRanks::kLowest);
    const uint32_t smallest = first << StartingRanks::kShift;
    const uint32_t largest = (last + 1) << StartingRanks::kShift;  // one float too far does no harm
    const auto rank = [](uint32_t bits, float sign) {
      return int{encode_dynamic(kSignedDynamicMap, sign * __builtin_bit_cast(float, bits))};
    };
    table.ranks[0][i] = static_cast<uint8_t>(rank(smallest, 1.0f));
    table.ranks[1][i] = static_cast<uint8_t>(rank(largest, -1.0f));
    if (rank(largest, 1.0f) > rank(smallest, 1.0f) + 1 ||
        rank(smallest, -1.0f) > rank(largest, -1.0f) + 1) {
      throw "a bucket holds two decision points";  // in a constant expression: does not compile
    }
  }
  return table;
}

inline constexpr StartingRanks kStartingRanks = starting_ranks();

}  // namespace qlora_native
