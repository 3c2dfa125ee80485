// Rotary positions.
#pragma once

#include <cstdint>
#include <vector>

#include "config.h"

namespace llama {

class Rope {
 public:
  explicit Rope(const Config& config);

  /// Turns the heads of one token, `head_count` x head_dim values, to its position: element i of the
  /// first half of a head and element i of the second are the coordinates of a point.
  void rotate(float* heads, int64_t head_count, int64_t position) const;

 private:
  int64_t half_;
  std::vector<float> frequencies_;  ///< radians per token, [head_dim / 2]
};

}  // namespace llama
