// A warp's piece of an array: 256 consecutive elements, of which a lane has two runs of four, so that
// every access of the warp is contiguous.
#pragma once

#include <cstdint>

#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"

namespace qlora_native::cuda {

inline constexpr int kSpanElems = 256;
inline constexpr int kLaneElems = kSpanElems / kWarpSize;

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T elems[4];
};

/// Where a lane's eight elements are. `kIsWhole`: all of the warp's elements exist, and arrays are
/// aligned to four of theirs; else single elements are accessed, and only those that exist.
template <bool kIsWhole>
struct LaneSpan {
  int64_t begin;  ///< of the first run; the second is kSpanElems / 2 behind
  int64_t numel;  ///< of the array

  __device__ __forceinline__ int64_t element(int i) const {
    return begin + (i / 4) * (kSpanElems / 2) + i % 4;
  }
  __device__ __forceinline__ bool exists(int i) const { return kIsWhole || element(i) < numel; }
};

/// Elements that do not exist are zeros.
template <bool kIsWhole, class T>
__device__ __forceinline__ void load_lane(const T* data, const LaneSpan<kIsWhole>& span,
                                          T (&out)[kLaneElems]) {
  if constexpr (kIsWhole) {
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      const auto four = *reinterpret_cast<const Four<T>*>(data + span.element(4 * run));
#pragma unroll
      for (int i = 0; i < 4; ++i) out[4 * run + i] = four.elems[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElems; ++i) out[i] = span.exists(i) ? data[span.element(i)] : T{};
  }
}

template <bool kIsWhole, class T>
__device__ __forceinline__ void store_lane(T* data, const LaneSpan<kIsWhole>& span,
                                           const T (&values)[kLaneElems]) {
  if constexpr (kIsWhole) {
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      Four<T> four;
#pragma unroll
      for (int i = 0; i < 4; ++i) four.elems[i] = values[4 * run + i];
      *reinterpret_cast<Four<T>*>(data + span.element(4 * run)) = four;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElems; ++i) {
      if (span.exists(i)) data[span.element(i)] = values[i];
    }
  }
}

template <class T>
__device__ __forceinline__ void to_floats(const T (&values)[kLaneElems], float (&out)[kLaneElems]) {
#pragma unroll
  for (int i = 0; i < kLaneElems; ++i) out[i] = to_float(values[i]);
}

}  // namespace qlora_native::cuda
