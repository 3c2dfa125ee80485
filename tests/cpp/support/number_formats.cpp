#include "support/number_formats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace qlora_native::testing {
namespace {

struct Format {
  int mantissa_bits;  ///< without the implicit one
  int bias;
  int exponent_bits;
  int total_bits() const { return 1 + exponent_bits + mantissa_bits; }
};

Format format_of(DType dtype) {
  if (dtype == DType::kFloat32) return {23, 127, 8};
  if (dtype == DType::kFloat16) return {10, 15, 5};
  return {7, 127, 8};
}

}  // namespace

double round_to(DType dtype, double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  const Format f = format_of(dtype);
  const int exponent = std::max(std::ilogb(x), 1 - f.bias);
  const double quantum = std::ldexp(1.0, exponent - f.mantissa_bits);
  const double rounded = std::nearbyint(x / quantum) * quantum;
  const double limit = std::ldexp(1.0, f.bias + 1);
  return std::fabs(rounded) >= limit ? std::copysign(std::numeric_limits<double>::infinity(), x)
                                     : rounded;
}

double unit_roundoff(DType dtype) { return std::ldexp(1.0, -1 - format_of(dtype).mantissa_bits); }

uint32_t to_bits(DType dtype, double x) {
  const Format f = format_of(dtype);
  const uint32_t exponent_mask = (1u << f.exponent_bits) - 1;
  const uint32_t quiet_nan = exponent_mask << f.mantissa_bits | 1u << (f.mantissa_bits - 1);
  if (std::isnan(x)) return quiet_nan;
  const uint32_t sign = std::signbit(x) ? 1u << (f.total_bits() - 1) : 0u;
  const double value = std::fabs(round_to(dtype, x));
  if (std::isinf(value)) return sign | exponent_mask << f.mantissa_bits;
  if (value == 0) return sign;
  const int exponent = std::max(std::ilogb(value), 1 - f.bias);
  const auto mantissa = static_cast<uint32_t>(std::ldexp(value, f.mantissa_bits - exponent));
  const uint32_t implicit_one = 1u << f.mantissa_bits;
  if (mantissa < implicit_one) return sign | mantissa;  // subnormal
  return sign | static_cast<uint32_t>(exponent + f.bias) << f.mantissa_bits |
         (mantissa - implicit_one);
}

double from_bits(DType dtype, uint32_t bits) {
  const Format f = format_of(dtype);
  const double sign = bits >> (f.total_bits() - 1) & 1u ? -1.0 : 1.0;
  const auto exponent = static_cast<int>(bits >> f.mantissa_bits & ((1u << f.exponent_bits) - 1));
  const uint32_t mantissa = bits & ((1u << f.mantissa_bits) - 1);
  if (exponent == (1 << f.exponent_bits) - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - f.bias - f.mantissa_bits);
  return sign * std::ldexp(mantissa | 1u << f.mantissa_bits, exponent - f.bias - f.mantissa_bits);
}

std::vector<uint8_t> to_bytes(DType dtype, const std::vector<double>& values) {
  const auto width = static_cast<size_t>(size_bytes(dtype));
  std::vector<uint8_t> bytes(values.size() * width);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t bits = to_bits(dtype, values[i]);
    std::memcpy(bytes.data() + i * width, &bits, width);
  }
  return bytes;
}

std::vector<double> from_bytes(DType dtype, const std::vector<uint8_t>& bytes) {
  const auto width = static_cast<size_t>(size_bytes(dtype));
  std::vector<double> values(bytes.size() / width);
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes.data() + i * width, width);
    values[i] = from_bits(dtype, bits);
  }
  return values;
}

}  // namespace qlora_native::testing
