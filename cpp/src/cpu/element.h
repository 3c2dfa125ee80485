// One element of an array of any dtype, as a float; and one constant of a quantized weight. The
// reference kernels are made of these, and the vector kernels use them for odd ends.
//
// Everything here is in an unnamed namespace on purpose: this header is compiled with and without
// AVX flags, and the linker would merge ordinary inline functions and might keep an AVX one for
// all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "qlora_native/dtype.h"
#include "qlora_native/quantized.h"

namespace qlora_native::cpu {
namespace {

constexpr uint32_t kQuietNan = 0x7fc00000u;
constexpr uint32_t kInfinityBits = 0x7f800000u;

[[maybe_unused]] inline uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
[[maybe_unused]] inline float bits_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
[[maybe_unused]] inline bool is_finite(float x) {
  return (float_bits(x) & kInfinityBits) != kInfinityBits;
}

/// Exact.
[[maybe_unused]] inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | kInfinityBits | (magnitude & 0x3ffu) << 13);
  // Shifted into place the exponent is too small by 127 - 15; the product is exact, also for
  // subnormals.
  const float scaled = bits_float(magnitude << 13) * 0x1p112f;
  return bits_float(sign | float_bits(scaled));
}

/// Rounds to nearest, ties to even; overflow gives an infinity; a NaN keeps the
/// top of its payload, as the processor's own conversion has it.
[[maybe_unused]] inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > kInfinityBits) {
    return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  }
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  if (magnitude < 0x38800000u) {
    // Below the smallest normal half the spacing is 2^-24, which adding 0.5 makes the fp32 unit.
    const float shifted = bits_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - float_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
}

[[maybe_unused]] inline float bfloat16_to_float(uint16_t x) {
  return bits_float(static_cast<uint32_t>(x) << 16);
}

/// Rounds to nearest, ties to even; a NaN stays one.
[[maybe_unused]] inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > kInfinityBits) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

[[maybe_unused]] inline float load_element(const void* data, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, static_cast<const char*>(data) + index * 4, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(data) + index * 2, 2);
  return dtype == DType::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

[[maybe_unused]] inline void store_element(void* data, int64_t index, DType dtype, float value) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<char*>(data) + index * 4, &value, 4);
    return;
  }
  const uint16_t bits = dtype == DType::kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
  std::memcpy(static_cast<char*>(data) + index * 2, &bits, 2);
}

[[maybe_unused]] inline const void* element_address(const void* data, int64_t index, DType dtype) {
  return static_cast<const char*>(data) + index * size_bytes(dtype);
}

[[maybe_unused]] inline void* element_address(void* data, int64_t index, DType dtype) {
  return static_cast<char*>(data) + index * size_bytes(dtype);
}

/// Constants may lie unaligned in a memory-mapped checkpoint.
[[maybe_unused]] inline float load_constant(const float* data, int64_t index) {
  return load_element(data, index, DType::kFloat32);
}

/// The scale of block `block`.
[[maybe_unused]] inline float block_absmax(const Absmax& absmax, int64_t block) {
  if (!absmax.is_double_quantized()) return load_constant(absmax.values, block);
  const float scaled = kSignedDynamicMap.values[absmax.codes[block]] *
                       load_constant(absmax.absmax2, block / kGroupSize);
  return scaled + load_constant(absmax.offset, 0);
}

[[maybe_unused]] inline uint8_t code_at(const uint8_t* packed, int64_t element) {
  const uint8_t byte = packed[element / 2];
  return element % 2 == 0 ? first_nibble(byte) : second_nibble(byte);
}

}  // namespace
}  // namespace qlora_native::cpu
