// Which elements a Dropout keeps (dropout.h has the definition), for host and device.
#pragma once

#include <cstdint>

#include "philox.h"
#include "qlora_native/dropout.h"

namespace qlora_native {

inline constexpr int kDropoutUnit = 8;          ///< columns that one block of Philox serves
inline constexpr uint32_t kAllKept = 0xffu;     ///< of a unit
inline constexpr uint32_t kNoneKept = 0x10000;  ///< the threshold of p = 1

/// A Dropout of a matrix of a number of columns, as kernels take it.
struct DropoutMask {
  uint64_t seed;
  uint64_t offset;
  int64_t units_per_row;
  uint32_t threshold;  ///< 0: everything is kept
  float scale;         ///< of what is kept; 0 when nothing is

  constexpr bool drops() const { return threshold != 0; }

  /// Bit i says whether element (row, 8 * unit + i) is kept.
  constexpr uint32_t kept(int64_t row, int64_t unit) const {
    const RandomWords random =
        philox(seed, static_cast<uint64_t>(row * units_per_row + unit),
               static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32));
    uint32_t bits = 0;
    for (int word = 0; word < 4; ++word) {
      const uint32_t low = random.words[word] & 0xffffu;
      const uint32_t high = random.words[word] >> 16;
      bits |= static_cast<uint32_t>(low >= threshold) << (2 * word);
      bits |= static_cast<uint32_t>(high >= threshold) << (2 * word + 1);
    }
    return bits;
  }
};

constexpr DropoutMask dropout_mask(const Dropout& dropout, int64_t cols) {
  const auto threshold = static_cast<uint32_t>(static_cast<double>(dropout.p) * 65536.0 + 0.5);
  const float scale =
      threshold == kNoneKept ? 0.0f : 65536.0f / static_cast<float>(kNoneKept - threshold);
  return {dropout.seed, dropout.offset, (cols + kDropoutUnit - 1) / kDropoutUnit, threshold, scale};
}

}  // namespace qlora_native
