// Code values in fixed point, two in a word: what a table of 16-bit floats would lose of them is not lost.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device/pair_table.cuh"
#include "qlora_native/codebook.h"

namespace qlora_native::cuda::sm90a::forward {

// Values in fixed point of 15 bits: in the second and third byte of a float whose highest is 0x43 they are
// 128 + u / 256, that is kFixedZero + kFixedOne * value. FP4's values, multiples of 1 / 192, and INT4's, of 1 / 7, are
// exact, NF4's lose 0.0053% (root of the mean square over normal weights, relative).
constexpr float kFixedOne = 52.5f;  // 10 * 192 * 7 / 256
constexpr float kFixedZero = 192.0f;

constexpr bool fit_fixed_point(const Codebook& codebook) {
  return std::all_of(codebook.values, codebook.values + 16, [](float value) {
    return 128.0f <= kFixedZero + kFixedOne * value && kFixedZero + kFixedOne * value < 255.5f;
  });
}
static_assert(fit_fixed_point(kNF4) && fit_fixed_point(kFP4) && fit_fixed_point(kINT4));

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
