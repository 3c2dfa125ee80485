// Optimizer steps, eight elements at a time.
#include "cpu/optimizer_blocks.h"
#include "cpu/simd_avx2.h"

namespace qlora_native::cpu {
namespace {

struct OptimizerAvx2 : Avx2 {
  template <DType kType>
  static void store_as(void* p, Floats x) {
    __m128i half;
    if constexpr (kType == DType::kFloat16) {
      half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      half = round_to_bfloat16(x);
    }
    _mm_storeu_si128(static_cast<__m128i*>(p), half);
  }
  /// As float_to_bfloat16 does.
  static __m128i round_to_bfloat16(Floats x) {
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
  static Floats square_root(Floats x) { return _mm256_sqrt_ps(x); }
  static Floats with_sign_of(Floats x, Floats y) {
    const Floats zero = _mm256_setzero_ps();
    const Floats positive = _mm256_and_ps(_mm256_cmp_ps(y, zero, _CMP_GT_OQ), x);
    const Floats negative =
        _mm256_and_ps(_mm256_cmp_ps(y, zero, _CMP_LT_OQ), _mm256_sub_ps(zero, x));
    return _mm256_or_ps(positive, negative);
  }
  static float largest_magnitude(const float* x) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < kStateBlock; i += kWidth) {
      const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
      largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, magnitude));
    }
    __m128i half =
        _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
    return bits_float(static_cast<uint32_t>(_mm_cvtsi128_si32(half)));
  }
  static void decode(const float* map, const uint8_t* codes, float absmax, float* out) {
    const Floats scale = _mm256_set1_ps(absmax);
    for (int64_t i = 0; i < kStateBlock; i += kWidth) {
      const __m256i index = _mm256_cvtepu8_epi32(
          _mm_loadl_epi64(static_cast<const __m128i*>(static_cast<const void*>(codes + i))));
      _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_i32gather_ps(map, index, 4), scale));
    }
  }
  /// nearest_code, with two gathers.
  template <class Table>
  static void encode(const Table& table, const float* x, float reciprocal, uint8_t* codes) {
    // A gather of words reads three bytes more than the last rank has.
    static_assert(sizeof(Table) >= sizeof(table.points) + sizeof(table.ranks) + 3);
    const Floats factor = _mm256_set1_ps(reciprocal);
    const auto* const ranks = static_cast<const int*>(static_cast<const void*>(table.ranks));
    for (int64_t i = 0; i < kStateBlock; i += kWidth) {
      const Floats scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), factor);
      const __m256i bits = _mm256_castps_si256(scaled);
      const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
      __m256i bucket = _mm256_sub_epi32(_mm256_srli_epi32(magnitude, Table::kShift),
                                        _mm256_set1_epi32(Table::kLowest));
      bucket = _mm256_max_epi32(bucket, _mm256_setzero_si256());
      bucket = _mm256_min_epi32(bucket, _mm256_set1_epi32(Table::kBuckets - 1));
      if constexpr (Table::kSigns == 2) {
        const __m256i row =
            _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(Table::kBuckets));
        bucket = _mm256_add_epi32(bucket, row);
      }
      const __m256i rank =
          _mm256_and_si256(_mm256_i32gather_epi32(ranks, bucket, 1), _mm256_set1_epi32(0xff));
      const Floats point = _mm256_i32gather_ps(table.points, rank, 4);
      const __m256i is_above = _mm256_castps_si256(_mm256_cmp_ps(scaled, point, _CMP_GT_OQ));
      const __m256i code = _mm256_sub_epi32(rank, is_above);
      const __m128i words =
          _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
      _mm_storel_epi64(static_cast<__m128i*>(static_cast<void*>(codes + i)),
                       _mm_packus_epi16(words, words));
    }
  }
};

}  // namespace

void step_elements_avx2(const StepCall& call, const OptimizerTensor& tensor,
                        const StepScalars& scalars, int64_t first, int64_t last) {
  step_elements<OptimizerAvx2>(call, tensor, scalars, first, last);
}

}  // namespace qlora_native::cpu
