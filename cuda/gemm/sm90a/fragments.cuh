// From codes to the fragments of the weight that wgmma takes from registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/pair_table.cuh"
#include "device/shared_memory.cuh"
#include "gemm/sm90a/layout.cuh"
#include "gemm/sm90a/scaled_values.cuh"

namespace qlora_native::cuda::sm90a {

/// How a lane reads the table (PairTable at a multiple of 64 KB): entries by a byte of a word.
struct LaneTable {
  uint32_t
      word;  ///< address of the lane's first entry; the table is below 16 MB, so the highest byte is free

  template <class T>
  __device__ __forceinline__ static LaneTable of(uint32_t table, int lane) {
    return {(table + lane * 4) | ScaledValues<T>::kLaneBits};
  }
  /// Makes an entry's address of byte `byte` of a word and `word`.
  __device__ __forceinline__ static uint32_t selector(int byte) {
    return 0x5604u | static_cast<uint32_t>(byte) << 4;
  }
  __device__ __forceinline__ uint32_t look_up(uint32_t codes, uint32_t selector) const {
    const uint32_t at = __byte_perm(codes, word, selector);
    uint32_t pair;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at));
    return pair;
  }
};

/// Forward: a lane's view of a chunk. Of a step it has two rows of its warp's 16, lane / 4 and lane / 4 + 8, and of every
/// eight weights of them the pair lane % 4: a byte of each of the row's eight words, which the four lanes of a row
/// all read, as single bytes would take as long.
template <class C>
struct ForwardFragments {
  using T = typename C::Elem;

  uint32_t row_at;    ///< of the first row, in a chunk
  uint32_t scale_at;  ///< of its scale
  uint32_t swizzle;   ///< of its pieces of 16 bytes
  uint32_t selector;
  LaneTable table;

  __device__ __forceinline__ static ForwardFragments of(uint32_t table, int warp, int lane) {
    const int row = warp * 16 + lane / 4;
    return {static_cast<uint32_t>(row * C::kCodeRowBytes), static_cast<uint32_t>(row * 8),
            static_cast<uint32_t>(lane / 4 * 16), LaneTable::selector(lane % 4),
            LaneTable::of<T>(table, lane)};
  }

  /// Where a chunk's scale of row `row` and step `step` lies: steps of a team beside each other.
  __device__ __forceinline__ static uint32_t place_of_scale(int row, int step) {
    return (step % 2 * kTileCols + row) * 8 + step / 2 * 4;
  }

  /// The codes of a step: the first half of both rows, then the second.
  __device__ __forceinline__ void load(uint32_t codes, int step, uint4 (&words)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = codes + row_at + (((2 * step + half) * 16) ^ swizzle);
      words[2 * half] = load_shared4(at);
      words[2 * half + 1] = load_shared4(at + 8 * C::kCodeRowBytes);
    }
  }

  /// Their entries in the order of wgmma's fragments.
  __device__ __forceinline__ void look_up(const uint4 (&words)[4], uint32_t (&pairs)[16]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 low = words[2 * half];
      const uint4 high = words[2 * half + 1];
      uint32_t* const part = pairs + 8 * half;
      part[0] = table.look_up(low.x, selector);
      part[1] = table.look_up(high.x, selector);
      part[2] = table.look_up(low.y, selector);
      part[3] = table.look_up(high.y, selector);
      part[4] = table.look_up(low.z, selector);
      part[5] = table.look_up(high.z, selector);
      part[6] = table.look_up(low.w, selector);
      part[7] = table.look_up(high.w, selector);
    }
  }

  /// A step's weights, scaled.
  __device__ __forceinline__ void decode(uint32_t codes, uint32_t scales, int step,
                                         uint32_t (&to)[16]) const {
    uint4 words[4];
    load(codes, step, words);
    const uint32_t scales_at = scales + place_of_scale(0, step) + scale_at;
    const float factors[2] = {load_shared(scales_at), load_shared(scales_at + 8 * 8)};
    look_up(words, to);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      using Values = ScaledValues<T>;
      to[i] = pack_pair<T>(Values::scale(Values::first(to[i], table.word), factors[i % 2]),
                           Values::scale(Values::second(to[i], table.word), factors[i % 2]));
    }
  }
};

/// Transposed: a fragment has weights of neighbouring rows of W in a register, and a byte of codes has
/// weights of neighbouring columns: of two bytes of two rows, first with first and second with second makes two
/// registers, which belong to rows lane / 4 and lane / 4 + 8 of the fragment. So these are neighbouring columns
/// (PanelOrder::kNeighbours). Both bytes come from a transposed 8x8 matrix: a lane gets two columns of bytes of two
/// rows, and its warp takes the even or the odd ones.
template <class C>
struct TransposedFragments {
  using T = typename C::Elem;

  uint32_t row_at;    ///< of the row whose address the lane gives, of 32 in a chunk
  uint32_t scale_at;  ///< of rows 2 * (lane % 4) and the next, then of those 8 further
  uint32_t first_selector;
  uint32_t second_selector;
  LaneTable table;

  __device__ __forceinline__ static TransposedFragments of(uint32_t table, int warp, int lane) {
    const int piece = warp / 2;  // of 16 bytes of a row, swizzled by 64 bytes
    return {static_cast<uint32_t>(lane * C::kCodeRowBytes + (piece ^ lane / 2 % 4) * 16),
            place_of_scale(lane % 4 * 2, warp / 4), LaneTable::selector(warp % 2),
            LaneTable::selector(warp % 2 + 2), LaneTable::of<T>(table, lane)};
  }

  /// Where a chunk's scale of row `row` and panel `panel` lies: those that a lane needs for a product beside each other.
  __device__ __forceinline__ static uint32_t place_of_scale(int row, int panel) {
    return (panel * kGemmSm90aChunk + row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2) *
           4;
  }

  /// A step's weights, scaled, in the order of wgmma's fragments.
  __device__ __forceinline__ void decode(uint32_t codes, uint32_t scales, int step,
                                         uint32_t (&to)[16]) const {
    uint32_t words[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_matrix_x4_transposed(codes + row_at + (step * kStep + half * 32) * C::kCodeRowBytes,
                                words[half]);
    }
    uint4 factors[kStep / 16];
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      factors[i] = load_shared4(scales + scale_at + (step * kStep + i * 16) * 4);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = table.look_up(words[i / 4][i % 4], first_selector);
      to[2 * i + 1] = table.look_up(words[i / 4][i % 4], second_selector);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 four = factors[i / 2];
      exchange(to[2 * i], to[2 * i + 1], __uint_as_float(i % 2 == 0 ? four.x : four.z),
               __uint_as_float(i % 2 == 0 ? four.y : four.w));
    }
  }

 private:
  /// Pairs of columns of two rows become pairs of rows of two columns.
  __device__ __forceinline__ void exchange(uint32_t& first, uint32_t& second, float first_factor,
                                           float second_factor) const {
    using Values = ScaledValues<T>;
    const uint32_t low =
        pack_pair<T>(Values::scale(Values::first(first, table.word), first_factor),
                     Values::scale(Values::first(second, table.word), second_factor));
    second = pack_pair<T>(Values::scale(Values::second(first, table.word), first_factor),
                          Values::scale(Values::second(second, table.word), second_factor));
    first = low;
  }
};

template <class C>
using FragmentsOf = std::conditional_t<C::kTransposed, TransposedFragments<C>, ForwardFragments<C>>;

}  // namespace qlora_native::cuda::sm90a
