// Quantization, 32 elements at a time.
//   absmax: integer maximum of the bits without the sign; NaN and infinity are the largest of all.
//   rank:   the number of the 15 decision points that compare below.
#include "cpu/encode_blocks.h"
#include "cpu/simd_avx2.h"

namespace qlora_native::cpu {
namespace {

class Encoder {
 public:
  explicit Encoder(const Codebook& book) {
    for (int i = 0; i < 15; ++i) points_[i] = _mm256_set1_ps(book.decision_points[i]);
    const void* codes = book.code_of_rank;
    codes_ = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(codes)));
  }

  /// Thirty-two elements, scaled by `factor`, to 16 bytes.
  template <DType kType>
  void encode32(const void* data, float factor, uint8_t* packed) const {
    const __m256 f = _mm256_set1_ps(factor);
    __m256 x[4];
    for (int j = 0; j < 4; ++j) {
      x[j] = _mm256_mul_ps(Avx2::load_as_float<kType>(element_address(data, 8 * j, kType)), f);
    }
    encode(x, packed);
  }

 private:
  /// Thirty-two scaled values to 16 bytes.
  void encode(const __m256 (&x)[4], uint8_t* packed) const {
    __m256i rank[4];
    for (int j = 0; j < 4; ++j) {
      rank[j] = _mm256_setzero_si256();
      for (const __m256& point : points_) {
        // A comparison that holds is -1.
        const __m256 above = _mm256_cmp_ps(x[j], point, _CMP_GT_OQ);
        rank[j] = _mm256_sub_epi32(rank[j], _mm256_castps_si256(above));
      }
    }
    const __m256i pairs = _mm256_packs_epi16(_mm256_packs_epi32(rank[0], rank[1]),
                                             _mm256_packs_epi32(rank[2], rank[3]));
    // The packs work within 128-bit lanes and leave runs of four bytes out of order.
    const __m256i ordered =
        _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const __m256i code = _mm256_shuffle_epi8(codes_, ordered);
    // even * 16 + odd, then the low byte of each 16 bits.
    const __m256i bytes = _mm256_maddubs_epi16(code, _mm256_set1_epi16(0x0110));
    const __m128i packed_bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    void* out = packed;
    _mm_storeu_si128(static_cast<__m128i*>(out), packed_bytes);
  }

  __m256 points_[15];
  __m256i codes_;
};

struct QuantizeAvx2 {
  using Encoder = cpu::Encoder;

  /// The largest |x| of `count` elements, a multiple of 16, as a float: NaN or infinity if any is.
  template <DType kType>
  static float largest_magnitude(const void* data, int64_t count) {
    const auto load = [data](int64_t i) {
      return _mm256_loadu_si256(static_cast<const __m256i*>(element_address(data, i, kType)));
    };
    __m256i largest = _mm256_setzero_si256();
    if constexpr (kType == DType::kFloat32) {
      const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
      for (int64_t i = 0; i < count; i += 8) {
        largest = _mm256_max_epu32(largest, _mm256_and_si256(load(i), magnitude));
      }
      __m128i rest =
          _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
      rest = _mm_max_epu32(rest, _mm_shuffle_epi32(rest, 0x4e));
      rest = _mm_max_epu32(rest, _mm_shuffle_epi32(rest, 0xb1));
      return bits_float(static_cast<uint32_t>(_mm_cvtsi128_si32(rest)));
    } else {
      const __m256i magnitude = _mm256_set1_epi16(0x7fff);
      for (int64_t i = 0; i < count; i += 16) {
        largest = _mm256_max_epu16(largest, _mm256_and_si256(load(i), magnitude));
      }
      const __m128i of8 =
          _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
      // The one horizontal instruction there is finds a minimum.
      const __m128i complement = _mm_xor_si128(of8, _mm_set1_epi16(-1));
      const auto bits = static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(complement)));
      return kType == DType::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
    }
  }
};

}  // namespace

void encode_blocks_avx2(const QuantizeArgs& args, int64_t first, int64_t last, float* absmax) {
  encode_blocks<QuantizeAvx2>(args, first, last, absmax);
}

}  // namespace qlora_native::cpu
