// Quantization, 32 elements at a time.
//   absmax: integer maximum of the bits without the sign; NaN and infinity are the largest of all.
//   rank:   bisection of the 15 decision points, held in registers, by 4 exact comparisons.
#include "cpu/encode_blocks.h"
#include "cpu/simd_avx512.h"

namespace qlora_native::cpu {
namespace {

/// Decision points arranged for the four steps of the bisection: table s holds, at index "rank
/// found so far", the point to compare with next.
class Encoder {
 public:
  explicit Encoder(const Codebook& book) {
    float step4[16];
    float step2[16];
    float step1[16];
    int32_t codes[16];
    for (int rank = 0; rank < 16; ++rank) {
      const auto point = [&book](int i) { return book.decision_points[i < 15 ? i : 14]; };
      step4[rank] = point(rank + 3);
      step2[rank] = point(rank + 1);
      step1[rank] = point(rank);
      codes[rank] = book.code_of_rank[rank];
    }
    step8_ = _mm512_set1_ps(book.decision_points[7]);
    step4_ = _mm512_loadu_ps(step4);
    step2_ = _mm512_loadu_ps(step2);
    step1_ = _mm512_loadu_ps(step1);
    codes_ = _mm512_loadu_si512(codes);
  }

  /// Thirty-two elements, scaled by `factor`, to 16 bytes.
  template <DType kType>
  void encode32(const void* data, float factor, uint8_t* packed) const {
    const __m512 f = _mm512_set1_ps(factor);
    for (int i = 0; i < 32; i += 16) {
      const __m512 x = Avx512::load_as_float<kType>(element_address(data, i, kType));
      encode16(_mm512_mul_ps(x, f), packed + i / 2);
    }
  }

 private:
  /// Sixteen scaled values to 8 bytes.
  void encode16(__m512 x, uint8_t* packed) const {
    __m512i rank = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x, step8_, _CMP_GT_OQ), 8);
    rank = step(x, step4_, rank, 4);
    rank = step(x, step2_, rank, 2);
    rank = step(x, step1_, rank, 1);
    const __m512i code = _mm512_permutexvar_epi32(rank, codes_);
    const __m512i byte = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
    _mm_storeu_si64(packed, _mm512_cvtepi64_epi8(byte));
  }

  static __m512i step(__m512 x, __m512 points, __m512i rank, int width) {
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(rank, points), _CMP_GT_OQ);
    return _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(width));
  }

  __m512 step8_, step4_, step2_, step1_;
  __m512i codes_;
};

struct QuantizeAvx512 {
  using Encoder = cpu::Encoder;

  /// The largest |x| of `count` elements, a multiple of 32, as a float: NaN or infinity if any is.
  template <DType kType>
  static float largest_magnitude(const void* data, int64_t count) {
    __m512i largest = _mm512_setzero_si512();
    if constexpr (kType == DType::kFloat32) {
      const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
      for (int64_t i = 0; i < count; i += 16) {
        const __m512i bits = _mm512_loadu_si512(element_address(data, i, kType));
        largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
      }
      return bits_float(_mm512_reduce_max_epu32(largest));
    } else {
      const __m512i magnitude = _mm512_set1_epi16(0x7fff);
      for (int64_t i = 0; i < count; i += 32) {
        const __m512i bits = _mm512_loadu_si512(element_address(data, i, kType));
        largest = _mm512_max_epu16(largest, _mm512_and_si512(bits, magnitude));
      }
      const __m256i of16 =
          _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
      const __m128i of8 =
          _mm_max_epu16(_mm256_castsi256_si128(of16), _mm256_extracti128_si256(of16, 1));
      // The one horizontal instruction there is finds a minimum.
      const __m128i complement = _mm_xor_si128(of8, _mm_set1_epi16(-1));
      const auto bits = static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(complement)));
      return kType == DType::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
    }
  }
};

}  // namespace

void encode_blocks_avx512(const QuantizeArgs& args, int64_t first, int64_t last, float* absmax) {
  encode_blocks<QuantizeAvx512>(args, first, last, absmax);
}

}  // namespace qlora_native::cpu
