// The moments of an optimizer between memory and registers: floats, or codes of the dynamic maps.
#pragma once

#include <cstdint>

#include "device/dynamic_code.cuh"
#include "device/encode.cuh"
#include "device/lane_span.cuh"
#include "nearest_code.h"
#include "optimizer_math.h"
#include "qlora_native/optimizer.h"

namespace qlora_native::cuda {

static_assert(kSpanElems == kStateBlockSize, "a warp scales the block that it holds");

inline constexpr int kMapThreads = 256;  ///< of the thread blocks that call `fill`

/// A dynamic map in shared memory: what codes mean, and the search of the nearest.
template <class Table>
struct MapTables {
  Table codes;
  float values[256];
};
static __device__ const SignedCodeTable kSignedCodesOnDevice = kSignedCodeTable;
static __device__ const UnsignedCodeTable kUnsignedCodesOnDevice = kUnsignedCodeTable;
static __device__ const DynamicMap kSignedMapOnDevice = kSignedDynamicMap;
static __device__ const DynamicMap kUnsignedMapOnDevice = kUnsignedDynamicMap;

template <class Table>
__device__ __forceinline__ void fill(MapTables<Table>& tables, const Table& codes,
                                     const DynamicMap& map) {
  constexpr int kVectors = sizeof(Table) / sizeof(uint4);
  static_assert(sizeof(Table) % sizeof(uint4) == 0 && kVectors <= kMapThreads);
  if (threadIdx.x < kVectors) {
    reinterpret_cast<uint4*>(&tables.codes)[threadIdx.x] =
        reinterpret_cast<const uint4*>(&codes)[threadIdx.x];
  }
  tables.values[threadIdx.x] = map.values[threadIdx.x];
}

/// A moment of the lane's elements, between memory and fp32.
template <StateFormat kFormat, class Table>
struct Moment;

template <class Table>
struct Moment<StateFormat::kFloat32, Table> {
  float values[kLaneElems];

  template <bool kIsWhole>
  __device__ __forceinline__ void load(const void* state, const float*,
                                       const LaneSpan<kIsWhole>& span, uint32_t) {
    load_lane(static_cast<const float*>(state), span, values);
  }
  __device__ __forceinline__ void decode(const MapTables<Table>*) {}
  template <bool kIsWhole>
  __device__ __forceinline__ void store(void* state, float*, const LaneSpan<kIsWhole>& span,
                                        const MapTables<Table>*, uint32_t) {
    store_lane(static_cast<float*>(state), span, values);
  }
};

template <class Table>
struct Moment<StateFormat::kDynamic8bit, Table> {
  float values[kLaneElems];
  uint8_t codes[kLaneElems];
  float absmax;

  /// What does not exist is zero, and stays it: it is encoded too, and has no part in the scale.
  template <bool kIsWhole>
  __device__ __forceinline__ void load(const void* state, const float* scales,
                                       const LaneSpan<kIsWhole>& span, uint32_t zero_code) {
    load_lane(static_cast<const uint8_t*>(state), span, codes);
#pragma unroll
    for (int i = 0; i < kLaneElems; ++i) {
      if (!span.exists(i)) codes[i] = static_cast<uint8_t>(zero_code);
    }
    absmax = scales[span.begin / kStateBlockSize];
  }
  __device__ __forceinline__ void decode(const MapTables<Table>* tables) {
#pragma unroll
    for (int i = 0; i < kLaneElems; ++i) values[i] = tables->values[codes[i]] * absmax;
  }
  /// By a warp.
  template <bool kIsWhole>
  __device__ __forceinline__ void store(void* state, float* scales, const LaneSpan<kIsWhole>& span,
                                        const MapTables<Table>* tables, uint32_t zero_code) {
    uint32_t largest_bits = 0;
#pragma unroll
    for (int i = 0; i < kLaneElems; ++i) {
      if (span.exists(i)) largest_bits = max(largest_bits, abs_bits(values[i]));
    }
    largest_bits = __reduce_max_sync(kAllLanes, largest_bits);
    const float largest = __uint_as_float(largest_bits);
    const bool has_codes = largest_bits > 0 && largest_bits < kInfinityBits;
    const float scale = largest < kSmallestStateAbsmax ? kSmallestStateAbsmax : largest;
    if (has_codes) {
      const float reciprocal = 1.0f / scale;
#pragma unroll
      for (int i = 0; i < kLaneElems; ++i) {
        uint32_t code = find_scaled_code(tables->codes, values[i] * reciprocal);
        // A second moment does not become 0 by rounding.
        if (Table::kSigns == 1 && values[i] > 0) code = max(code, 1u);
        codes[i] = static_cast<uint8_t>(code);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLaneElems; ++i) codes[i] = static_cast<uint8_t>(zero_code);
    }
    store_lane(static_cast<uint8_t*>(state), span, codes);
    if (threadIdx.x % kWarpSize == 0) {
      scales[span.begin / kStateBlockSize] = has_codes           ? scale
                                             : largest_bits == 0 ? 0.0f
                                                                 : __uint_as_float(kNaNBits);
    }
  }
};

}  // namespace qlora_native::cuda
