// The scales of kernel.cuh: from those of the weight to what its multipliers read.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/decode.cuh"
#include "device/grid_dependency.cuh"
#include "device/mbarrier.cuh"
#include "device/shared_memory.cuh"
#include "gemm/sm90a/fragments.cuh"
#include "gemm/sm90a/layout.cuh"
#include "gemm/sm90a/scaled_values.cuh"

namespace qlora_native::cuda::sm90a {

/// Scales of neighbouring units of a row, before the arithmetic. `kWide`: they are loaded at once, and are of one group.
template <class C, bool kWide>
struct RawScales {
  static constexpr int kUnits = C::kWeightUnits;

  float values[C::kDoubleQuant && kWide ? 1 : kUnits];
  uint32_t codes[C::kDoubleQuant ? (kWide ? 1 : kUnits) : 1];

  __device__ __forceinline__ void load(const Params<typename C::Elem>& p, uint32_t row, int first) {
    const uint32_t row_index = row * static_cast<uint32_t>(p.weight_units);
    if constexpr (kWide && C::kDoubleQuant) {
      using Codes = std::conditional_t<kUnits == 4, uint32_t, uint16_t>;
      const uint32_t index = row_index + first;
      codes[0] = load_after_wait(reinterpret_cast<const Codes*>(p.scales.codes + index));
      values[0] = load_after_wait(p.scales.absmax2 + index / kGroupSize);
    } else if constexpr (kWide) {
      using Values = std::conditional_t<kUnits == 4, uint4, uint2>;
      const Values words =
          load_after_wait(reinterpret_cast<const Values*>(p.scales.values + row_index + first));
      values[0] = __uint_as_float(words.x);
      values[1] = __uint_as_float(words.y);
      if constexpr (kUnits == 4) {
        values[2] = __uint_as_float(words.z);
        values[3] = __uint_as_float(words.w);
      }
    } else {
      const int shift = p.scales.block_shift - 6;
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        const uint32_t unit = min(first + j, p.weight_units - 1);
        const uint32_t index = (row_index + unit) >> shift;
        if constexpr (C::kDoubleQuant) {
          codes[j] = load_after_wait(p.scales.codes + index);
          values[j] = load_after_wait(p.scales.absmax2 + index / kGroupSize);
        } else {
          values[j] = load_after_wait(p.scales.values + index);
        }
      }
    }
  }

  /// Of unit `j`.
  __device__ __forceinline__ float decode(int j, uint32_t map, float offset) const {
    if constexpr (!C::kDoubleQuant) return values[j];
    const uint32_t code = kWide ? codes[0] >> (8 * j) & 255 : codes[j];
    return decode_scale(load_shared(map + code * 4), values[kWide ? 0 : j], offset);
  }
};

/// `thread` of kScaleThreads: each has some rows of every chunk.
template <class C, bool kWide>
__device__ __forceinline__ void decode_scales(const Params<typename C::Elem>& p,
                                              const Shared<C>& shared, int block, int thread) {
  constexpr int kRows = C::kWeightRows / kScaleThreads;
  constexpr int kAhead = kWide ? 2 : 1;  // two of narrow loads take registers that there are not
  const float offset = C::kDoubleQuant ? load_after_wait(p.scales.offset) : 0.0f;
  RingPosition<C::kChunks> at;
  for (Segments segment(p.plan, block); segment.next();) {
    RawScales<C, kWide> raw[kAhead][kRows];
    const auto load = [&](int chunk, RawScales<C, kWide>(&to)[kRows]) {
      const auto box = WeightBox::of<C>(segment, min(chunk, segment.chunks - 1));
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = min(box.row + i * kScaleThreads + thread, p.weight_rows - 1);
        to[i].load(p, row, box.unit);
      }
    };
    const auto decode = [&](int chunk, const RawScales<C, kWide>(&from)[kRows],
                            float(&to)[kRows][C::kWeightUnits]) {
      const auto box = WeightBox::of<C>(segment, chunk);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool row_exists = box.row + i * kScaleThreads + thread < p.weight_rows;
#pragma unroll
        for (int j = 0; j < C::kWeightUnits; ++j) {
          const float decoded = from[i].decode(j, shared.map(), offset);
          const float scale =
              row_exists && box.unit + j < p.weight_units ? decoded * p.table.scale_inverse : 0.0f;
          to[i][j] = C::kScalesWeights ? ScaledValues<typename C::Elem>::factor(scale) : scale;
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(i, raw[i]);
    for (int first = 0; first < segment.chunks; first += kAhead) {
      // Registers that stay in their place: moving them on would wait for the loads.
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int chunk = first + i;
        if (chunk >= segment.chunks) break;
        float scales[kRows][C::kWeightUnits];
        decode(chunk, raw[i], scales);
        load(chunk + kAhead, raw[i]);
        const int slot = at.slot();
        wait_barrier(shared.chunk_empty(slot), at.round() ^ 1);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
#pragma unroll
          for (int j = 0; j < C::kWeightUnits; ++j) {
            store_shared(shared.scales(slot) +
                             FragmentsOf<C>::place_of_scale(row * kScaleThreads + thread, j),
                         scales[row][j]);
          }
        }
        arrive(shared.chunk_full(slot));
        ++at.count;
      }
    }
  }
}

}  // namespace qlora_native::cuda::sm90a
