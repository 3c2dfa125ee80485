// Tables that make the search of a dynamic 8-bit map one comparison. Used by every backend.
#pragma once

#include <cstdint>
#include <limits>

#include "qlora_native/codebook.h"

namespace qlora_native {

/// Where to start looking for the nearest entry: floats are sorted into buckets by sign, exponent
/// and the top `kFractionBits` bits of the fraction, each narrow enough to hold at most one decision
/// point. Magnitudes below 2^-kOctaves share a bucket. Aligned, so that a thread block copies it in
/// vectors; the alignment leaves bytes behind `ranks`, which a gather of words may read.
template <int kSignCount, int kFractionBits, int kOctaves>
struct alignas(16) NearestCodeTable {
  static constexpr int kSigns = kSignCount;  ///< 1: for floats that are not negative
  static constexpr int kShift = 23 - kFractionBits;
  static constexpr int32_t kLowest = (127 - kOctaves) << kFractionBits;
  static constexpr int32_t kBuckets = (kOctaves << kFractionBits) + 1;  ///< the last begins at 1

  float points[256] = {};                 ///< the decision points, and infinity
  uint8_t ranks[kSigns * kBuckets] = {};  ///< rank of a bucket's lowest float; positive ones first

  static constexpr int32_t bucket(uint32_t magnitude_bits) {
    const int32_t index = static_cast<int32_t>(magnitude_bits >> kShift) - kLowest;
    return index < 0 ? 0 : index < kBuckets ? index : kBuckets - 1;
  }
};

template <class Table>
constexpr Table nearest_code_table(const DynamicMap& map) {
  Table table;
  for (int i = 0; i < 255; ++i) table.points[i] = map.decision_points[i];
  table.points[255] = std::numeric_limits<float>::infinity();  // nothing lies above the last entry
  for (int32_t i = 0; i < Table::kBuckets; ++i) {
    const auto first = static_cast<uint32_t>(i == 0 ? 0 : i + Table::kLowest);
    const auto last = static_cast<uint32_t>(i + Table::kLowest);
    const uint32_t smallest = first << Table::kShift;
    const uint32_t largest = (last + 1) << Table::kShift;  // one float too far does no harm
    for (int sign = 0; sign < Table::kSigns; ++sign) {
      const auto rank = [&](uint32_t bits) {
        const float magnitude = __builtin_bit_cast(float, bits);
        return int{encode_dynamic(map, sign == 0 ? magnitude : -magnitude)};
      };
      const int low = rank(sign == 0 ? smallest : largest);
      const int high = rank(sign == 0 ? largest : smallest);
      table.ranks[sign * Table::kBuckets + i] = static_cast<uint8_t>(low);
      if (high > low + 1) {
        throw "a bucket holds two decision points";  // in a constant expression: does not compile
      }
    }
  }
  return table;
}

using SignedCodeTable = NearestCodeTable<2, 6, 20>;
using UnsignedCodeTable = NearestCodeTable<1, 7, 22>;

inline constexpr SignedCodeTable kSignedCodeTable =
    nearest_code_table<SignedCodeTable>(kSignedDynamicMap);
inline constexpr UnsignedCodeTable kUnsignedCodeTable =
    nearest_code_table<UnsignedCodeTable>(kUnsignedDynamicMap);

/// encode_dynamic of a finite float (with one sign: that is not negative) by one comparison: no
/// chain of loads, no branch on noise.
template <class Table>
inline uint8_t nearest_code(const Table& table, float x) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  const int32_t row = Table::kSigns == 2 && (bits >> 31) != 0 ? Table::kBuckets : 0;
  const uint8_t rank = table.ranks[row + Table::bucket(bits & 0x7fffffffu)];
  return static_cast<uint8_t>(rank + static_cast<int>(x > table.points[rank]));
}

}  // namespace qlora_native
