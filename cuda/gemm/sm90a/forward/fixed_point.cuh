// Code values in fixed point, two in a word: what a table of 16-bit floats would lose of them is not lost.
#pragma once

#include <cstdint>

#include "device/pair_table.cuh"

namespace qlora_native::cuda::sm90a::forward {

// Values in fixed point of 15 bits: in the second and third byte of a float whose highest is 0x43 they are
// 128 + u / 256, that is kFixedZero + kFixedOne * value. All named codebooks but NF4 are exact, NF4's values lose
// 0.0044% (root of the mean square over normal weights, relative).
constexpr float kFixedOne = 63.75f;  // 85 * 192 / 256: FP4's values are multiples of 1 / 192
constexpr float kFixedZero = 192.0f;

__device__ __forceinline__ uint32_t fixed_point(float value) {
  return static_cast<uint32_t>(__float2int_rn(value * (kFixedOne * 256.0f)) + 64 * 256);
}

/// What a fixed-point value is multiplied by, and then added.
__device__ __forceinline__ uint2 fixed_scale(float scale) {
  // Without the last bits the offset is exact, and a weight of zero zero.
  const float factor = __uint_as_float(__float_as_uint(scale) & ~3u);
  return make_uint2(__float_as_uint(factor), __float_as_uint(-kFixedZero * factor));
}

/// Both values of a pair, scaled, and rounded once.
template <class T>
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, uint2 scale) {
  constexpr uint32_t kExponent = 0x43000000;
  const float first = __uint_as_float(__byte_perm(pair, kExponent, 0x7104));
  const float second = __uint_as_float(__byte_perm(pair, kExponent, 0x7324));
  const float factor = __uint_as_float(scale.x);
  const float offset = __uint_as_float(scale.y);
  return pack_pair<T>(fmaf(first, factor, offset), fmaf(second, factor, offset));
}

}  // namespace qlora_native::cuda::sm90a::forward
