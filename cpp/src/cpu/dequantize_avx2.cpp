// Dequantization by byte shuffles: a 16-bit table is looked up as its low and its high bytes.
#include "cpu/decode_blocks.h"
#include "cpu/simd_avx2.h"

namespace qlora_native::cpu {
namespace {

/// Thirty-two codes in order, one to a byte, from 16 bytes.
__m256i unpack_codes(const uint8_t* packed) {
  const void* address = packed;
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(address));
  const __m128i nibble = _mm_set1_epi8(0xf);
  const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
  const __m128i second = _mm_and_si128(bytes, nibble);
  return _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
}

/// Eight floats rounded to bfloat16, as float_to_bfloat16 does, or to half.
template <DType kType>
__m128i round_to_16_bits(__m256 x) {
  if constexpr (kType == DType::kFloat16) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}

struct DequantizeAvx2 {
  /// 16-bit outputs.
  template <DType kType>
  class BlockTable {
   public:
    BlockTable(const float* values, float absmax) {
      const Avx2::Table scaled = Avx2::scale(Avx2::load_table(values), absmax);
      const __m128i first = round_to_16_bits<kType>(scaled.low);
      const __m128i second = round_to_16_bits<kType>(scaled.high);
      const __m128i byte = _mm_set1_epi16(0xff);
      low_ = _mm256_broadcastsi128_si256(
          _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte)));
      high_ = _mm256_broadcastsi128_si256(
          _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
    }

    void decode32(const uint8_t* packed, void* out) const {
      const __m256i codes = unpack_codes(packed);
      const __m256i low = _mm256_shuffle_epi8(low_, codes);
      const __m256i high = _mm256_shuffle_epi8(high_, codes);
      const __m256i a = _mm256_unpacklo_epi8(low, high);  // elements 0-7 and 16-23
      const __m256i b = _mm256_unpackhi_epi8(low, high);  // elements 8-15 and 24-31
      auto* vectors = static_cast<__m256i*>(out);
      _mm256_storeu_si256(vectors, _mm256_permute2x128_si256(a, b, 0x20));
      _mm256_storeu_si256(vectors + 1, _mm256_permute2x128_si256(a, b, 0x31));
    }

   private:
    __m256i low_, high_;
  };
};

template <>
class DequantizeAvx2::BlockTable<DType::kFloat32> {
 public:
  BlockTable(const float* values, float absmax)
      : table_(Avx2::scale(Avx2::load_table(values), absmax)) {}

  void decode32(const uint8_t* packed, void* out) const {
    for (int i = 0; i < 2; ++i) {
      Avx2::Floats even;
      Avx2::Floats odd;
      Avx2::decode_pairs(packed + 8 * i, table_, &even, &odd);
      Avx2::store_interleaved(static_cast<float*>(out) + 16 * i, even, odd);
    }
  }

 private:
  Avx2::Table table_;
};

}  // namespace

void decode_blocks_avx2(const DequantizeArgs& args, int64_t first, int64_t last) {
  decode_blocks<DequantizeAvx2>(args, first, last);
}

}  // namespace qlora_native::cpu
