// The scales of gemm_sm90a.cu: from those of the weight to what its multipliers read.
#pragma once

#include <cstdint>

#include "device/decode.cuh"
#include "device/grid_dependency.cuh"
#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "gemm/sm90a/forward/fixed_point.cuh"
#include "gemm/sm90a/forward/layout.cuh"

namespace qlora_native::cuda::sm90a::forward {

/// Scales of four neighbouring units of a row, before the arithmetic.
struct RawScales {
  float values[kChunkSteps];
  uint32_t codes;
};

template <class C>
__device__ __forceinline__ RawScales load_scales(const Params<typename C::Elem>& p, uint32_t row,
                                                 int first) {
  const int shift = p.scales.block_shift - 6;
  const uint32_t row_index = row * static_cast<uint32_t>(p.weight_units);
  RawScales raw;
  raw.codes = 0;
  if (p.scales_are_wide) {
    const uint32_t index = row_index + first;
    if constexpr (C::kDoubleQuant) {
      asm volatile("ld.global.u32 %0, [%1];"
                   : "=r"(raw.codes)
                   : "l"(p.scales.codes + index)
                   : "memory");
      const float value = load_after_wait(p.scales.absmax2 + index / kGroupSize);
#pragma unroll
      for (int j = 0; j < kChunkSteps; ++j) raw.values[j] = value;
    } else {
      const uint4 words = load_after_wait(reinterpret_cast<const uint4*>(p.scales.values + index));
      raw.values[0] = __uint_as_float(words.x);
      raw.values[1] = __uint_as_float(words.y);
      raw.values[2] = __uint_as_float(words.z);
      raw.values[3] = __uint_as_float(words.w);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kChunkSteps; ++j) {
      const uint32_t unit = min(first + j, p.weight_units - 1);
      const uint32_t index = (row_index + unit) >> shift;
      if constexpr (C::kDoubleQuant) {
        raw.codes |= load_after_wait(p.scales.codes + index) << (8 * j);
        raw.values[j] = load_after_wait(p.scales.absmax2 + index / kGroupSize);
      } else {
        raw.values[j] = load_after_wait(p.scales.values + index);
      }
    }
  }
  return raw;
}

/// `thread` of kScaleThreads: each has two rows of every chunk.
template <class C>
__device__ __forceinline__ void decode_scales(const Params<typename C::Elem>& p,
                                              const Shared<C>& shared, int block, int thread) {
  using T = typename C::Elem;
  constexpr int kRows = kTileCols / kScaleThreads;
  constexpr int kAhead = 2;
  const float offset = C::kDoubleQuant ? load_after_wait(p.scales.offset) : 0.0f;
  RingPosition<C::kChunks> at;
  for (Segments segment(p.plan, block); segment.next();) {
    const int chunks = segment.chunks;
    RawScales raw[kAhead][kRows];
    const auto load = [&](int chunk, RawScales(&to)[kRows]) {
      const int first = (segment.first + min(chunk, chunks - 1)) * kChunkSteps;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = min(segment.first_col + i * kScaleThreads + thread, p.weight_rows - 1);
        to[i] = load_scales<C>(p, row, first);
      }
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(i, raw[i]);
    for (int chunk = 0; chunk < chunks; ++chunk, ++at.count) {
      const int first = (segment.first + chunk) * kChunkSteps;
      constexpr int kPairs = C::kScalesWeights ? kChunkSteps : 2;
      uint2 scales[kRows][kPairs];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool row_exists = segment.first_col + i * kScaleThreads + thread < p.weight_rows;
        float decoded[kChunkSteps];
#pragma unroll
        for (int j = 0; j < kChunkSteps; ++j) {
          float scale = raw[0][i].values[j];
          if constexpr (C::kDoubleQuant) {
            const uint32_t code = raw[0][i].codes >> (8 * j) & 255;
            scale = decode_scale(load_shared(shared.map() + code * 4), scale, offset);
          }
          decoded[j] =
              row_exists && first + j < p.weight_units ? scale * p.table.scale_inverse : 0.0f;
        }
        if constexpr (C::kScalesWeights) {
#pragma unroll
          for (int j = 0; j < kChunkSteps; ++j) scales[i][j] = fixed_scale(decoded[j]);
        } else {
          // The steps of a team beside each other.
          scales[i][0] = make_uint2(__float_as_uint(decoded[0]), __float_as_uint(decoded[2]));
          scales[i][1] = make_uint2(__float_as_uint(decoded[1]), __float_as_uint(decoded[3]));
        }
        raw[0][i] = raw[1][i];
      }
      load(chunk + kAhead, raw[1]);
      const int slot = at.slot();
      wait_barrier(shared.chunk_empty(slot), at.round() ^ 1);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const uint32_t at = shared.scales(slot) + (i * kScaleThreads + thread) * 8;
#pragma unroll
        for (int j = 0; j < kPairs; ++j) store_shared(at + j * kTileCols * 8, scales[i][j]);
      }
      arrive(shared.chunk_full(slot));
    }
  }
}

}  // namespace qlora_native::cuda::sm90a::forward
