// Code values that are scaled in fp32 and rounded once, two in a word: what a table of the activations' type would lose
// of them is not lost.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "device/pair_table.cuh"
#include "host/table_values.h"
#include "qlora_native/codebook.h"
#include "qlora_native/dtype.h"

namespace qlora_native::cuda::sm90a {

/// For weights that are rounded to T. `kLaneBits` go into the highest byte of a lane's address in the table, `lane_word`.
template <class T>
struct ScaledValues;

/// Halves: NF4 loses 0.0086% in them (table_values), of the 0.165% that rounding to bfloat16 loses.
template <>
struct ScaledValues<__nv_bfloat16> {
  static constexpr uint32_t kLaneBits = 0;

  static TableValues of(const Codebook& codebook) {
    return table_values(codebook, DType::kFloat16);
  }
  __device__ __forceinline__ static uint32_t pair(float first, float second) {
    return pack_pair<__half>(first, second);
  }
  /// The first value of a pair, as `scale` takes it.
  __device__ __forceinline__ static float first(uint32_t pair, uint32_t) {
    return __low2float(reinterpret_cast<const __half2&>(pair));
  }
  __device__ __forceinline__ static float second(uint32_t pair, uint32_t) {
    return __high2float(reinterpret_cast<const __half2&>(pair));
  }
  __device__ __forceinline__ static float factor(float scale) { return scale; }
  __device__ __forceinline__ static float scale(float value, float factor) {
    return value * factor;
  }
};

/// Fixed point of 15 bits: in the second and third byte of a float whose highest is 0x43 it is 128 + u / 256, that
/// is kZero + kOne * value. FP4's values, multiples of 1 / 192, and INT4's, of 1 / 7, are exact, NF4's lose 0.0053%
/// (root of the mean square over normal weights, relative) of the 0.021% that rounding to halves loses.
template <>
struct ScaledValues<__half> {
  static constexpr uint32_t kLaneBits = 0x43000000;
  static constexpr float kOne = 52.5f;  // 10 * 192 * 7 / 256
  static constexpr float kZero = 192.0f;

  static TableValues of(const Codebook& codebook) {
    TableValues table{};
    std::copy_n(codebook.values, 16, table.values);
    table.scale_inverse = 1.0f / kOne;
    return table;
  }
  static constexpr bool fit(const Codebook& codebook) {
    return std::all_of(codebook.values, codebook.values + 16, [](float value) {
      return 128.0f <= kZero + kOne * value && kZero + kOne * value < 255.5f;
    });
  }
  __device__ __forceinline__ static uint32_t fixed(float value) {
    return static_cast<uint32_t>(__float2int_rn(value * (kOne * 256.0f)) + 64 * 256);
  }
  __device__ __forceinline__ static uint32_t pair(float first, float second) {
    return fixed(first) | fixed(second) << 16;
  }
  // Of the lane's word the second byte is 0, the highest 0x43.
  __device__ __forceinline__ static float first(uint32_t pair, uint32_t lane_word) {
    return __uint_as_float(__byte_perm(pair, lane_word, 0x7105));
  }
  __device__ __forceinline__ static float second(uint32_t pair, uint32_t lane_word) {
    return __uint_as_float(__byte_perm(pair, lane_word, 0x7325));
  }
  /// Without the last bits the offset is exact, and a weight of zero zero.
  __device__ __forceinline__ static float factor(float scale) {
    return __uint_as_float(__float_as_uint(scale) & ~3u);
  }
  __device__ __forceinline__ static float scale(float value, float factor) {
    return fmaf(value, factor, -kZero * factor);
  }
};
static_assert(ScaledValues<__half>::fit(kNF4) && ScaledValues<__half>::fit(kFP4) &&
              ScaledValues<__half>::fit(kINT4));

}  // namespace qlora_native::cuda::sm90a
