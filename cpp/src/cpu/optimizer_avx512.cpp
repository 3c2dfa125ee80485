// Optimizer steps, sixteen elements at a time.
#include "cpu/optimizer_blocks.h"
#include "cpu/simd_avx512.h"

namespace qlora_native::cpu {
namespace {

struct OptimizerAvx512 : Avx512 {
  template <DType kType>
  static void store_as(void* p, Floats x) {
    const __m256i half = kType == DType::kFloat16
                             ? _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                             : round_to_bfloat16(x);
    _mm256_storeu_si256(static_cast<__m256i*>(p), half);
  }
  static Floats square_root(Floats x) { return _mm512_sqrt_ps(x); }
  static Floats with_sign_of(Floats x, Floats y) {
    const Floats positive =
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_GT_OQ), x);
    const __mmask16 is_negative = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_sub_ps(positive, is_negative, _mm512_setzero_ps(), x);
  }
  static float largest_magnitude(const float* x) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < kStateBlock; i += kWidth) {
      largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    }
    return bits_float(_mm512_reduce_max_epu32(largest));
  }
  static void decode(const float* map, const uint8_t* codes, float absmax, float* out) {
    const Floats scale = _mm512_set1_ps(absmax);
    for (int64_t i = 0; i < kStateBlock; i += kWidth) {
      const __m512i index = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(static_cast<const __m128i*>(static_cast<const void*>(codes + i))));
      _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_i32gather_ps(index, map, 4), scale));
    }
  }
  /// nearest_code, with two gathers.
  template <class Table>
  static void encode(const Table& table, const float* x, float reciprocal, uint8_t* codes) {
    // A gather of words reads three bytes more than the last rank has.
    static_assert(sizeof(Table) >= sizeof(table.points) + sizeof(table.ranks) + 3);
    const Floats factor = _mm512_set1_ps(reciprocal);
    for (int64_t i = 0; i < kStateBlock; i += kWidth) {
      const Floats scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), factor);
      const __m512i bits = _mm512_castps_si512(scaled);
      const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
      __m512i bucket = _mm512_sub_epi32(_mm512_srli_epi32(magnitude, Table::kShift),
                                        _mm512_set1_epi32(Table::kLowest));
      bucket = _mm512_max_epi32(bucket, _mm512_setzero_si512());
      bucket = _mm512_min_epi32(bucket, _mm512_set1_epi32(Table::kBuckets - 1));
      if constexpr (Table::kSigns == 2) {
        bucket = _mm512_mask_add_epi32(bucket, _mm512_movepi32_mask(bits), bucket,
                                       _mm512_set1_epi32(Table::kBuckets));
      }
      const __m512i rank =
          _mm512_and_si512(_mm512_i32gather_epi32(bucket, table.ranks, 1), _mm512_set1_epi32(0xff));
      const Floats point = _mm512_i32gather_ps(rank, table.points, 4);
      const __mmask16 is_above = _mm512_cmp_ps_mask(scaled, point, _CMP_GT_OQ);
      const __m512i code = _mm512_mask_add_epi32(rank, is_above, rank, _mm512_set1_epi32(1));
      _mm_storeu_si128(static_cast<__m128i*>(static_cast<void*>(codes + i)),
                       _mm512_cvtepi32_epi8(code));
    }
  }
};

}  // namespace

void step_elements_avx512(const StepCall& call, const OptimizerTensor& tensor,
                          const StepScalars& scalars, int64_t first, int64_t last) {
  step_elements<OptimizerAvx512>(call, tensor, scalars, first, last);
}

}  // namespace qlora_native::cpu
