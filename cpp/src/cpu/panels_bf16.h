// Weights and activations as tiles of bfloat16, for kernels that multiply pairs of bfloat16 into
// fp32 (AMX, AVX-512 BF16). In an unnamed namespace for the reason given in element.h.
//
// The weights are rounded as dequantization to bfloat16 rounds them. As a block has only sixteen
// values, they are scaled and rounded once, and every weight is a lookup. To make that cheap, a
// chunk of 64 weights is taken in the order in which shifts bring their codes forth: byte i of a
// 16-bit word holds elements 2 i and 2 i + 1, so element e of all sixteen words comes at a time,
// e = 0, 1, 2, 3. A sum may be in any order that both factors share; a row of outputs is put back
// in order when it is stored.
#pragma once

#include "cpu/decode.h"
#include "cpu/simd_avx512.h"
#include "qlora_native/views.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kChunk = 64;      ///< weights with one scale
constexpr int64_t kGroup = 16;      ///< rows, or columns, of a tile
constexpr int64_t kStepDepth = 32;  ///< terms of a sum that a tile holds
constexpr int64_t kTileElems = kGroup * kStepDepth;
constexpr int64_t kPieceDepth = 2 * kChunk;  ///< columns of a row of W decoded at a time
constexpr int64_t kPieceSteps = kPieceDepth / kStepDepth;
constexpr int64_t kPrefetchRows = 32;  ///< of W, fetched before they are decoded

/// The block of an element. Block sizes are powers of two; a division would take as long as the
/// decoding of a chunk.
inline int64_t block_of(const QuantizedView& weight, int64_t element) {
  return element >> std::countr_zero(static_cast<uint64_t>(weight.block_size));
}

/// Whether every chunk of a row lies in one block, and starts at a byte.
inline bool chunks_hold_one_scale(const QuantizedView& weight) {
  return weight.cols % kChunk == 0 && weight.block_size >= kChunk;
}

/// Sixteen low floats and sixteen high ones, rounded to bfloat16.
inline __m512i round_pair(__m512 low, __m512 high) {
  return __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(high, low));
}

inline void store_512(uint16_t* out, __m512i x) { _mm512_storeu_si512(out, x); }

/// 64 elements of 16 bits in chunk order: `first` has e = 0, then e = 1, `second` e = 2, then
/// e = 3.
inline void to_chunk_order(__m512i low, __m512i high, __m512i* first, __m512i* second) {
  const __m512i quarter =
      _mm512_set_epi16(61, 57, 53, 49, 45, 41, 37, 33, 29, 25, 21, 17, 13, 9, 5, 1, 60, 56, 52, 48,
                       44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
  *first = _mm512_permutex2var_epi16(low, quarter, high);
  *second = _mm512_permutex2var_epi16(low, _mm512_add_epi16(quarter, _mm512_set1_epi16(2)), high);
}

/// The first `count` of the 32 elements from `begin` on of an array of bfloat16; zeros behind.
inline __m512i load_bf16(const void* data, int64_t begin, int64_t count) {
  if (count <= 0) return _mm512_setzero_si512();
  const auto mask = static_cast<__mmask32>(count >= 32 ? ~uint32_t{0} : (uint32_t{1} << count) - 1);
  return _mm512_maskz_loadu_epi16(mask, element_address(data, begin, DType::kBFloat16));
}

/// Elements [begin, begin + count) of W, count <= kChunk, as bfloat16 in order; zeros behind. For
/// rows that do not hold whole chunks.
inline void decode_any(const QuantizedView& weight, int64_t begin, int64_t count, __m512i* low,
                       __m512i* high) {
  float values[kChunk + 2 * Avx512::kWidth];
  if (count > 0) decode_run<Avx512>(weight, begin, count, values);
  if (count < kChunk) std::fill(values + std::max<int64_t>(count, 0), values + kChunk, 0.0f);
  *low = round_pair(_mm512_loadu_ps(values), _mm512_loadu_ps(values + 16));
  *high = round_pair(_mm512_loadu_ps(values + 32), _mm512_loadu_ps(values + 48));
}

// ---- Y = X W^T: sixteen rows of W as rows of tiles. A piece of a row, two chunks, gives four tiles
// a row each: tile e has elements e of the first chunk's words, then those of the second chunk's ----

/// Tile rows from chunks in chunk order: `first` and `second` of two chunks.
inline void join_chunks(const __m512i (&chunk)[2][2], __m512i (&out)[kPieceSteps]) {
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = _mm512_shuffle_i64x2(chunk[0][i], chunk[1][i], 0x44);
    out[2 * i + 1] = _mm512_shuffle_i64x2(chunk[0][i], chunk[1][i], 0xee);
  }
}

/// A piece from its 64 bytes; the table holds the values of the first chunk's block, then those of
/// the second's. Shifts of 32 bits, as those of 16 take the port of the permutes.
inline void decode_piece(__m512i words, __m512i table, __m512i (&out)[kPieceSteps]) {
  // Bit 4 of an index says which chunk. Codes at even places are masked, and get that bit, at once.
  const __m512i codes = _mm512_set1_epi8(0x0f);
  const __m512i which_chunk = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(0x10), 1);
  constexpr int kAndThenOr = 0xea;
  const __m512i odd = _mm512_ternarylogic_epi32(words, codes, which_chunk, kAndThenOr);
  const __m512i even =
      _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4), codes, which_chunk, kAndThenOr);
  out[0] = _mm512_permutexvar_epi16(even, table);
  out[1] = _mm512_permutexvar_epi16(odd, table);
  out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi32(even, 8), table);
  out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi32(odd, 8), table);
}

inline void store_piece(uint16_t* out, const __m512i (&rows)[kPieceSteps]) {
  for (int e = 0; e < kPieceSteps; ++e) store_512(out + e * kTileElems, rows[e]);
}

/// Scales of the chunks of a row are decoded this many elements of the row at a time.
constexpr int64_t kSegment = 4096;
/// Room for the scales of a row's segment.
constexpr int64_t kSegmentScales = kSegment / kChunk + kScalePadding + 1;

/// Where the scales of the segment that holds element d0 of a row begin: its first block.
inline int64_t first_block_of_segment(const QuantizedView& weight, int64_t row, int64_t d0) {
  return block_of(weight, row * weight.cols + d0 / kSegment * kSegment);
}

/// Scales of rows [n0, n0 + count) of W in the segment from d0 on, kSegmentScales apart, for
/// decode_rows. Rows that W does not have get none.
inline void decode_row_scales(const QuantizedView& weight, int64_t n0, int64_t count, int64_t d0,
                              float* scales) {
  if (!chunks_hold_one_scale(weight) || weight.cols == 0) return;
  const int64_t depth = std::min(kSegment, weight.cols - d0);
  for (int64_t n = n0; n < std::min(n0 + count, weight.rows); ++n, scales += kSegmentScales) {
    const int64_t first = first_block_of_segment(weight, n, d0);
    const int64_t last = block_of(weight, n * weight.cols + d0 + depth - 1);
    decode_scales<Avx512>(weight.absmax, first, last - first + 1, scales);
  }
}

/// Rows [n0, n0 + rows) of W, columns [d0, d0 + depth), where rows hold whole chunks.
inline void decode_regular_rows(const QuantizedView& weight, int64_t n0, int64_t rows, int64_t d0,
                                int64_t depth, const float* scales, uint16_t* tiles) {
  const int log2_block_size = std::countr_zero(static_cast<uint64_t>(weight.block_size));
  const __m512 values = _mm512_loadu_ps(weight.codebook.values);
  const int64_t row_bytes = weight.cols / 2;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t begin = (n0 + r) * weight.cols + d0;
    const uint8_t* packed = weight.packed + begin / 2;
    const int64_t first_block = first_block_of_segment(weight, n0 + r, d0);
    const auto scale_at = [&](int64_t d) {
      return scales[((begin + d) >> log2_block_size) - first_block];
    };
    uint16_t* out = tiles + r * kStepDepth;
    for (int64_t d = 0; d < depth; d += kPieceDepth) {
      const float scale = scale_at(d);
      float next_scale = 0.0f;
      __m512i words;
      if (d0 + d + kChunk < weight.cols) {
        next_scale = scale_at(d + kChunk);
        words = _mm512_loadu_si512(packed);
      } else {  // the row ends with its first half
        words = _mm512_maskz_loadu_epi64(0xf, packed);
      }
      const __m512i table =
          round_pair(Avx512::scale(values, scale), Avx512::scale(values, next_scale));
      // The same place of a row further on: the hardware does not foresee where a row begins.
      Avx512::prefetch_l2(packed + kPrefetchRows * row_bytes);
      __m512i piece[kPieceSteps];
      decode_piece(words, table, piece);
      store_piece(out, piece);
      packed += kPieceDepth / 2;
      out += kPieceSteps * kTileElems;
    }
    scales += kSegmentScales;
  }
}

/// A row that need not hold whole chunks.
inline void decode_any_row(const QuantizedView& weight, int64_t row, int64_t d0, int64_t depth,
                           uint16_t* out) {
  for (int64_t d = d0; d < d0 + depth; d += kPieceDepth) {
    __m512i chunks[2][2];
    for (int i = 0; i < 2; ++i) {
      const int64_t at = d + i * kChunk;
      decode_any(weight, row * weight.cols + at, std::min(kChunk, weight.cols - at), &chunks[i][0],
                 &chunks[i][1]);
      to_chunk_order(chunks[i][0], chunks[i][1], &chunks[i][0], &chunks[i][1]);
    }
    __m512i piece[kPieceSteps];
    join_chunks(chunks, piece);
    store_piece(out, piece);
    out += kPieceSteps * kTileElems;
  }
}

/// Rows [n0, n0 + rows) of W, columns [d0, d0 + depth), to rows of tiles
/// [depth / kStepDepth][kGroup][kStepDepth]; rows and columns that W does not have are zeros. d0
/// and depth are multiples of kPieceDepth, in one segment; `scales` is from decode_row_scales.
inline void decode_rows(const QuantizedView& weight, int64_t n0, int64_t rows, int64_t d0,
                        int64_t depth, const float* scales, uint16_t* tiles) {
  const int64_t real = weight.cols == 0 ? 0 : std::clamp<int64_t>(weight.rows - n0, 0, rows);
  if (chunks_hold_one_scale(weight)) {
    decode_regular_rows(weight, n0, real, d0, depth, scales, tiles);
  } else {
    for (int64_t r = 0; r < real; ++r) {
      decode_any_row(weight, n0 + r, d0, depth, tiles + r * kStepDepth);
    }
  }
  for (int64_t r = real; r < rows; ++r) {
    for (int64_t d = 0; d < depth; d += kStepDepth) {
      store_512(tiles + r * kStepDepth + d * kGroup, _mm512_setzero_si512());
    }
  }
}

/// Rows [m0, m0 + kGroup) of X, columns [d0, d0 + kPieceDepth), to four tiles of pairs
/// [kStepDepth / 2][kGroup][2], in the order of decode_rows; what X does not have is zero.
inline void pack_columns(const MatrixView& x, int64_t m0, int64_t d0, uint16_t* tiles) {
  alignas(64) float rows[kPieceSteps][kGroup][kStepDepth / 2];  // pairs of bfloat16
  for (int64_t m = 0; m < kGroup; ++m) {
    __m512i piece[kPieceSteps] = {};
    if (m0 + m < x.rows) {
      __m512i chunks[2][2];
      for (int i = 0; i < 2; ++i) {
        const int64_t begin = (m0 + m) * x.row_stride + d0 + i * kChunk;
        const int64_t count = x.cols - d0 - i * kChunk;
        to_chunk_order(load_bf16(x.data, begin, count), load_bf16(x.data, begin + 32, count - 32),
                       &chunks[i][0], &chunks[i][1]);
      }
      join_chunks(chunks, piece);
    }
    for (int e = 0; e < kPieceSteps; ++e) _mm512_store_si512(rows[e][m], piece[e]);
  }
  for (int e = 0; e < kPieceSteps; ++e) {
    float pairs[kGroup][kStepDepth / 2];
    Avx512::transpose(rows[e][0], kStepDepth / 2, pairs[0], kStepDepth / 2);
    std::memcpy(tiles + e * kTileElems, pairs, sizeof(pairs));
  }
}

// ---- dX = dY W: pairs of rows of W as rows of tiles; a chunk of columns makes four tiles ----

/// Rows n and n + 1 of a chunk: tile e gets (W[n][c], W[n + 1][c]) for its sixteen columns. The
/// table holds the values of row n's block, then those of row n + 1's.
inline void decode_chunk_pair(const uint8_t* packed, const uint8_t* next_packed, __m512i table,
                              __m512i (&out)[4]) {
  const auto load = [](const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  };
  const __m512i spread = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8,
                                          8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i words =
      _mm512_mask_permutexvar_epi16(_mm512_cvtepu16_epi32(load(packed)), 0xaaaaaaaau, spread,
                                    _mm512_castsi256_si512(load(next_packed)));
  // Bit 4 of an index says which row. Codes at even places are masked, and get that bit, at once.
  const __m512i codes = _mm512_set1_epi32(0x0f0f0f0f);
  const __m512i which_row = _mm512_set1_epi32(0x10100000);
  constexpr int kAndThenOr = 0xea;
  const __m512i odd = _mm512_ternarylogic_epi32(words, codes, which_row, kAndThenOr);
  const __m512i even =
      _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4), codes, which_row, kAndThenOr);
  out[0] = _mm512_permutexvar_epi16(even, table);
  out[1] = _mm512_permutexvar_epi16(odd, table);
  out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi32(even, 8), table);
  out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi32(odd, 8), table);
}

/// As decode_chunk_pair, for rows that do not hold whole chunks; `has_next` says whether there is a
/// row n + 1.
inline void decode_any_pair(const QuantizedView& weight, int64_t begin, int64_t count,
                            bool has_next, __m512i (&out)[4]) {
  __m512i rows[2][2];  // [row][e / 2]
  for (int row = 0; row < 2; ++row) {
    const int64_t have = row == 0 || has_next ? count : 0;
    decode_any(weight, begin + row * weight.cols, have, &rows[row][0], &rows[row][1]);
    to_chunk_order(rows[row][0], rows[row][1], &rows[row][0], &rows[row][1]);
  }
  const auto widen = [](__m512i x, int e) {
    return _mm512_cvtepu16_epi32(e % 2 == 0 ? _mm512_castsi512_si256(x)
                                            : _mm512_extracti64x4_epi64(x, 1));
  };
  for (int e = 0; e < 4; ++e) {
    out[e] =
        _mm512_or_si512(widen(rows[0][e / 2], e), _mm512_slli_epi32(widen(rows[1][e / 2], e), 16));
  }
}

/// Most columns of decode_row_pairs.
constexpr int64_t kMaxPairColumns = 512;

/// Scales of the chunks of `columns` columns from element `begin` of W on.
inline void decode_chunk_scales(const QuantizedView& weight, int64_t begin, int64_t columns,
                                float* scales) {
  const int64_t first = block_of(weight, begin);
  const int64_t last = block_of(weight, begin + columns - 1);
  decode_scales<Avx512>(weight.absmax, first, last - first + 1, scales);
}

/// Rows n and n + 1 of W, columns [c0, c0 + columns), where rows hold whole chunks. `out` is their
/// place in the tile of the first sixteen columns.
inline void decode_row_pair(const QuantizedView& weight, int64_t n, int64_t c0, int64_t columns,
                            uint16_t* out) {
  const bool has_next = n + 1 < weight.rows;
  const int log2_block_size = std::countr_zero(static_cast<uint64_t>(weight.block_size));
  const __m512 values = _mm512_loadu_ps(weight.codebook.values);
  const int64_t begin = n * weight.cols + c0;
  const int64_t next = has_next ? weight.cols : 0;  // row n again, times zero
  constexpr int64_t kRoom = kMaxPairColumns / kChunk + 1 + kScalePadding;
  float room[2][kRoom] = {};
  decode_chunk_scales(weight, begin, columns, room[0]);
  if (has_next) decode_chunk_scales(weight, begin + next, columns, room[1]);
  const auto scale_at = [&](const float* scales, int64_t row_begin, int64_t c) {
    return scales[((row_begin + c) >> log2_block_size) - (row_begin >> log2_block_size)];
  };
  for (int64_t c = 0; c < columns; c += kChunk) {
    const int64_t element = begin + c;
    const uint8_t* packed = weight.packed + element / 2;
    Avx512::prefetch_l2(packed + kPrefetchRows * weight.cols / 2);
    Avx512::prefetch_l2(packed + (kPrefetchRows + 1) * weight.cols / 2);
    const __m512i table = round_pair(Avx512::scale(values, scale_at(room[0], begin, c)),
                                     Avx512::scale(values, scale_at(room[1], begin + next, c)));
    __m512i pairs[4];
    decode_chunk_pair(packed, packed + next / 2, table, pairs);
    for (const __m512i& pair : pairs) {
      store_512(out, pair);
      out += kTileElems;
    }
  }
}

/// Rows [d0, d0 + depth) of W, columns [c0, c0 + columns), to tiles
/// [depth / kStepDepth][columns / kGroup][kStepDepth / 2][kGroup][2]; rows and columns that W does
/// not have are zeros. c0 and columns are multiples of kChunk, depth of kStepDepth; every chunk
/// starts in W.
inline void decode_row_pairs(const QuantizedView& weight, int64_t d0, int64_t depth, int64_t c0,
                             int64_t columns, uint16_t* tiles) {
  for (int64_t d = 0; d < depth; d += 2) {
    const int64_t n = d0 + d;
    const int64_t step = d / kStepDepth;
    // Tiles of a step lie together: strips of columns would be a power of two apart, in the same sets
    // of the cache.
    uint16_t* out = tiles + step * columns * kStepDepth + (d % kStepDepth) * kGroup;
    if (n < weight.rows && chunks_hold_one_scale(weight)) {
      decode_row_pair(weight, n, c0, columns, out);
      continue;
    }
    for (int64_t c = 0; c < columns; c += kChunk) {
      __m512i pairs[4] = {};
      if (n < weight.rows) {
        decode_any_pair(weight, n * weight.cols + c0 + c, std::min(kChunk, weight.cols - c0 - c),
                        n + 1 < weight.rows, pairs);
      }
      for (const __m512i& pair : pairs) {
        store_512(out, pair);
        out += kTileElems;
      }
    }
  }
}

/// Rows [m0, m0 + kGroup) of dY, columns [d0, d0 + kStepDepth), to a tile; what dY does not have is
/// zero.
inline void pack_rows(const MatrixView& dy, int64_t m0, int64_t d0, uint16_t* tile) {
  for (int64_t m = 0; m < kGroup; ++m) {
    const bool is_real = m0 + m < dy.rows;
    store_512(tile + m * kStepDepth,
              is_real ? load_bf16(dy.data, (m0 + m) * dy.row_stride + d0, dy.cols - d0)
                      : _mm512_setzero_si512());
  }
}

}  // namespace
}  // namespace qlora_native::cpu
