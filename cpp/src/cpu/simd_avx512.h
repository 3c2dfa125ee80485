// AVX-512 vocabulary of the matrix products: sixteen floats, and sixteen table entries in a
// register. In an unnamed namespace for the reason given in element.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "qlora_native/dtype.h"

namespace qlora_native::cpu {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  using Floats = __m512;
  using Table = __m512;  ///< sixteen values, one for each code

  static constexpr int kGemmRows = 14;    ///< register tile of the microkernel, in rows of A
  static constexpr int kGemmVectors = 2;  ///< and in vectors of columns: 28 accumulators of 32
  static constexpr int kGemvRows = 4;     ///< rows of W that the row-times-row tile takes at a time

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats set1(float x) { return _mm512_set1_ps(x); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static float sum(Floats x) { return _mm512_reduce_add_ps(x); }

  template <DType kType>
  static Floats load_as_float(const void* p) {
    if constexpr (kType == DType::kFloat32) {
      return _mm512_loadu_ps(p);
    } else {
      const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
      if constexpr (kType == DType::kFloat16) return _mm512_cvtph_ps(half);
      return widen_bfloat16(half);
    }
  }
  static Floats widen_bfloat16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  /// As float_to_bfloat16 does; the processor's own conversion would flush subnormal numbers.
  static __m256i round_to_bfloat16(Floats x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, quiet));
  }

  static Table load_table(const float* values) { return _mm512_loadu_ps(values); }
  static Table scale(Table table, float factor) {
    return _mm512_mul_ps(table, _mm512_set1_ps(factor));
  }

  /// Thirty-two weights from 16 bytes: those at even positions, and those at odd ones. A permute
  /// looks at the low four bits of an index only, so neither nibble is masked.
  static void decode_pairs(const uint8_t* packed, Table table, Floats* even, Floats* odd) {
    const __m512i bytes = _mm512_cvtepu8_epi32(
        _mm_loadu_si128(static_cast<const __m128i*>(static_cast<const void*>(packed))));
    *even = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
    *odd = _mm512_permutexvar_ps(bytes, table);
  }

  /// The inverse of the split above: 32 floats in order.
  static void store_interleaved(float* out, Floats even, Floats odd) {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, first, odd));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, second, odd));
  }

  /// Splits 32 floats in order into those at even and those at odd positions.
  static void store_split(float* out, Floats first, Floats second) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(first, even, second));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(first, odd, second));
  }

  /// out[i] = map[codes[i]] * absmax2 + offset, two roundings. Writes up to the next multiple
  /// of 16.
  static void decode_absmax(const float* map, const uint8_t* codes, int64_t count, float absmax2,
                            float offset, float* out) {
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t left = count - i;
      const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
      const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + i));
      const __m512 scaled =
          _mm512_mul_ps(_mm512_i32gather_ps(index, map, 4), _mm512_set1_ps(absmax2));
      _mm512_storeu_ps(out + i, _mm512_add_ps(scaled, _mm512_set1_ps(offset)));
    }
  }

  /// out[c * out_stride + r] = in[r * in_stride + c] for 16 x 16 elements.
  static void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    __m512 a[16];
    __m512 b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * in_stride);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    // Now a[4 q + j] holds columns j, j+4, j+8, j+12 (a 128-bit lane each) of rows 4 q .. 4 q + 3.
    for (int j = 0; j < 4; ++j) {
      const __m512 low01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
      const __m512 high01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
      const __m512 low23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
      const __m512 high23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
      _mm512_storeu_ps(out + (j + 0) * out_stride, _mm512_shuffle_f32x4(low01, low23, 0x88));
      _mm512_storeu_ps(out + (j + 8) * out_stride, _mm512_shuffle_f32x4(low01, low23, 0xdd));
      _mm512_storeu_ps(out + (j + 4) * out_stride, _mm512_shuffle_f32x4(high01, high23, 0x88));
      _mm512_storeu_ps(out + (j + 12) * out_stride, _mm512_shuffle_f32x4(high01, high23, 0xdd));
    }
  }
};

}  // namespace
}  // namespace qlora_native::cpu
