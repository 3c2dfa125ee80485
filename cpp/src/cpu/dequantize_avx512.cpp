// Dequantization by permutes: 32 elements of 16 bits, or 16 of 32 bits, for one lookup.
#include "cpu/decode_blocks.h"
#include "cpu/simd_avx512.h"

namespace qlora_native::cpu {
namespace {

struct DequantizeAvx512 {
  /// 16-bit outputs. The table is there twice: a permute of 32 looks at five bits of an index, and
  /// the fifth is the other nibble's.
  template <DType kType>
  class BlockTable {
   public:
    BlockTable(const float* values, float absmax) {
      const __m512 scaled = Avx512::scale(_mm512_loadu_ps(values), absmax);
      if constexpr (kType == DType::kFloat16) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        table_ = _mm512_broadcast_i64x4(_mm512_cvtps_ph(scaled, kNearest));
      } else {
        table_ = _mm512_broadcast_i64x4(Avx512::round_to_bfloat16(scaled));
      }
    }

    void decode32(const uint8_t* packed, void* out) const {
      const void* address = packed;
      const __m512i bytes =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(address)));
      const __m512i codes =
          _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
      _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, table_));
    }

   private:
    __m512i table_;
  };
};

template <>
class DequantizeAvx512::BlockTable<DType::kFloat32> {
 public:
  BlockTable(const float* values, float absmax)
      : table_(Avx512::scale(_mm512_loadu_ps(values), absmax)) {}

  void decode32(const uint8_t* packed, void* out) const {
    for (int i = 0; i < 2; ++i) {
      const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadu_si64(packed + 8 * i));
      const __m512i codes =
          _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
      _mm512_storeu_ps(static_cast<char*>(out) + 64 * i, _mm512_permutexvar_ps(codes, table_));
    }
  }

 private:
  __m512 table_;
};

}  // namespace

void decode_blocks_avx512(const DequantizeArgs& args, int64_t first, int64_t last) {
  decode_blocks<DequantizeAvx512>(args, first, last);
}

}  // namespace qlora_native::cpu
