// The shape of a weight.
#pragma once

#include <cstdint>
#include <string>

namespace bench {

/// W[N, K]: outputs by inputs.
struct Shape {
  int64_t n = 0;
  int64_t k = 0;
  friend bool operator==(const Shape&, const Shape&) = default;
};

inline std::string to_string(Shape shape) {
  return std::to_string(shape.n) + "x" + std::to_string(shape.k);
}

}  // namespace bench
