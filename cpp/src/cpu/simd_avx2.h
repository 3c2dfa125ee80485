// AVX2 vocabulary of the matrix products: eight floats, and the sixteen table entries in two
// registers. In an unnamed namespace for the reason given in element.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "qlora_native/dtype.h"

namespace qlora_native::cpu {
namespace {

struct Avx2 {
  static constexpr int kWidth = 8;
  using Floats = __m256;
  struct Table {
    __m256 low, high;  ///< values of codes 0..7 and 8..15
  };

  static constexpr int kGemmRows = 6;     ///< register tile of the microkernel, in rows of A
  static constexpr int kGemmVectors = 2;  ///< and in vectors of columns: 12 accumulators of 16
  static constexpr int kGemvRows = 2;     ///< rows of W that the row-times-row tile takes at a time

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats set1(float x) { return _mm256_set1_ps(x); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static float sum(Floats x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  template <DType kType>
  static Floats load_as_float(const void* p) {
    if constexpr (kType == DType::kFloat32) {
      return _mm256_loadu_ps(static_cast<const float*>(p));
    } else {
      const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
      if constexpr (kType == DType::kFloat16) return _mm256_cvtph_ps(half);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
  }

  static Table load_table(const float* values) {
    return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
  }
  static Table scale(Table table, float factor) {
    const __m256 f = _mm256_set1_ps(factor);
    return {_mm256_mul_ps(table.low, f), _mm256_mul_ps(table.high, f)};
  }

  /// `codes` hold a code in their low four bits; the fourth goes to the sign, which picks the half.
  static Floats lookup(Table table, __m256i codes) {
    const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, codes),
                            _mm256_permutevar8x32_ps(table.high, codes), sign);
  }

  /// Sixteen weights from 8 bytes: those at even positions, and those at odd ones.
  static void decode_pairs(const uint8_t* packed, Table table, Floats* even, Floats* odd) {
    const __m256i bytes = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(static_cast<const __m128i*>(static_cast<const void*>(packed))));
    *even = lookup(table, _mm256_srli_epi32(bytes, 4));
    *odd = lookup(table, bytes);
  }

  /// The inverse of the split above: 16 floats in order.
  static void store_interleaved(float* out, Floats even, Floats odd) {
    const __m256 low = _mm256_unpacklo_ps(even, odd);
    const __m256 high = _mm256_unpackhi_ps(even, odd);
    _mm256_storeu_ps(out, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }

  /// Splits 16 floats in order into those at even and those at odd positions.
  static void store_split(float* out, Floats first, Floats second) {
    const __m256 low = _mm256_permute2f128_ps(first, second, 0x20);
    const __m256 high = _mm256_permute2f128_ps(first, second, 0x31);
    // low holds elements 0-3 and 8-11, high 4-7 and 12-15; a shuffle picks within 128-bit lanes.
    _mm256_storeu_ps(out, _mm256_shuffle_ps(low, high, 0x88));
    _mm256_storeu_ps(out + 8, _mm256_shuffle_ps(low, high, 0xdd));
  }

  /// out[i] = map[codes[i]] * absmax2 + offset, two roundings. Writes up to the next multiple
  /// of 16.
  static void decode_absmax(const float* map, const uint8_t* codes, int64_t count, float absmax2,
                            float offset, float* out) {
    for (int64_t i = 0; i < count; ++i) {
      const float scaled = map[codes[i]] * absmax2;
      out[i] = scaled + offset;
    }
  }

  /// out[c * out_stride + r] = in[r * in_stride + c] for 8 x 8 elements.
  static void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    __m256 a[8];
    __m256 b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(in + i * in_stride);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      _mm256_storeu_ps(out + j * out_stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
      _mm256_storeu_ps(out + (j + 4) * out_stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
    }
  }
};

}  // namespace
}  // namespace qlora_native::cpu
