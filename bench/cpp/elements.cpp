#include "elements.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace bench {
namespace {

using qlora_native::DType;

// The exponents of float16 and float32 are this far apart.
constexpr uint32_t kHalfBias = 127 - 15;

float from_half(uint16_t bits) {
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 0x1F;
  const int mantissa = bits & 0x3FF;
  if (exponent == 0x1F) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 0x400), exponent - 25);
}

/// Numbers below float16's normal range become zero, those above it infinite.
uint16_t to_half(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t exponent = bits >> 23 & 0xFF;
  if (exponent <= kHalfBias) return sign;
  if (exponent >= kHalfBias + 0x1F) return static_cast<uint16_t>(sign | 0x7C00);
  return static_cast<uint16_t>(sign | (exponent - kHalfBias) << 10 | (bits >> 13 & 0x3FF));
}

}  // namespace

float HostArray::operator[](int64_t index) const {
  const auto size = static_cast<size_t>(qlora_native::size_bytes(dtype_));
  const uint8_t* at = raw_.data() + static_cast<size_t>(index) * size;
  if (dtype_ == DType::kFloat32) {
    float value = 0;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t bits = 0;
  std::memcpy(&bits, at, sizeof bits);
  return dtype_ == DType::kFloat16 ? from_half(bits)
                                   : std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

std::vector<uint8_t> encode(std::span<const float> values, DType dtype) {
  const auto size = static_cast<size_t>(qlora_native::size_bytes(dtype));
  std::vector<uint8_t> raw(values.size() * size);
  uint8_t* to = raw.data();
  for (const float value : values) {
    if (dtype == DType::kFloat32) {
      std::memcpy(to, &value, sizeof value);
    } else {
      const auto upper = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
      const uint16_t bits = dtype == DType::kFloat16 ? to_half(value) : upper;
      std::memcpy(to, &bits, sizeof bits);
    }
    to += size;
  }
  return raw;
}

double half_ulp(double x, DType dtype) {
  struct Format {
    int digits;
    int min_exponent;
  };
  const Format format = dtype == DType::kFloat32   ? Format{24, -126}
                        : dtype == DType::kFloat16 ? Format{11, -14}
                                                   : Format{8, -126};
  const int exponent = x == 0 ? format.min_exponent : std::ilogb(x);
  return std::ldexp(1.0, std::max(exponent, format.min_exponent) - format.digits);
}

}  // namespace bench
