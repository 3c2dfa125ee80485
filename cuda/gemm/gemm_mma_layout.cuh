// What the parts of gemm_mma.cuh agree on: steps, sums and where things lie in shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/decode.cuh"
#include "device/mbarrier.cuh"
#include "device/pair_table.cuh"
#include "device/warp_reduce.cuh"
#include "device/warp_ring.cuh"
#include "gemm/heuristics.h"
#include "host/table_values.h"

namespace qlora_native::cuda::gemm_mma_kernels {

constexpr int kWarps = kGemmMmaWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileRows = kGemmMmaTileRows;
constexpr int kUnit = 64;
constexpr int kShareUnits = kGemmMmaShare / kUnit;
constexpr int kRowBytes = kGemmMmaShare / 2;  // of codes
constexpr int kTileBytes = kTileRows * kRowBytes;
constexpr int kSlabsAtOnce = 3;  // whose sums are on their way at a time

/// A step of a warp: a tile by 16 rows of X, or two tiles by eight.
template <int kGroups>  // of eight rows of X
struct StepOf {
  static constexpr int kTiles = 2 / kGroups;
  static constexpr int kRows = kTiles * kTileRows;
  static constexpr int kStages = kTiles == 2 ? 2 : 3;  // four for 16 rows were slower
  using Ring = WarpRing<kStages, kTiles * kTileBytes>;
};

/// The sums of a step, as the lanes of an mma hold them, of two mma: element 4 l + i of a half is sums[i] of lane l.
/// The warps' own lie in the gaps of the table, of two steps in turn: a warp adds them up a step later.
struct Fragments {
  static constexpr int kElements = 2 * 128;
  static constexpr uint32_t kWarpBytes = kElements * 4 / 128 * PairTable::kStride;
  static constexpr uint32_t kStepBytes = kWarps * kWarpBytes;
  static_assert(2 * kStepBytes == PairTable::kBytes);
  static constexpr int kPiece = kElements / kWarps;    // what a warp adds up
  static constexpr int kSharers = kWarpSize / kPiece;  // lanes of an element
  static constexpr int kLoads = kWarps / kSharers;

  /// Where an element of warp `k_warp` lies. Those that are read at a time are in different banks.
  __device__ static __forceinline__ uint32_t at(int element, int k_warp) {
    const uint32_t byte = element * 4 ^ k_warp % kSharers * (kPiece * 4);
    return byte / 128 * PairTable::kStride + byte % 128;
  }
  /// The element of a row of the step and a row of X.
  __device__ static __forceinline__ int element_of(int row, int token) {
    const int g = row % 2 * 4 + row % 8 / 2;
    return (row / kTileRows + token / 8) * 128 + (g * 4 + token % 8 / 2) * 4 + row / 8 % 2 * 2 +
           token % 2;
  }
};

// Shared memory: the map, the barriers, the sums of a pass, rings for which there is no room behind; the
// table, aligned in the window, with the fragments in its gaps; the rings.
constexpr uint32_t kWindow = 65536;
constexpr uint32_t kBarriersAt = 1024;
constexpr int kMaxStages = 3;
constexpr uint32_t kStepBarriersAt = kBarriersAt + kWarps * kMaxStages * kBarrierBytes;
constexpr uint32_t kSumsAt = 2048;
static_assert(kStepBarriersAt + 2 * kWarps * kBarrierBytes <= kSumsAt);
constexpr uint32_t kBytesBehind = 96 * 1024;  // what is left of 227 KB
constexpr uint32_t kSharedBytes = kWindow + PairTable::kBytes + kBytesBehind;

template <int kGroups>
struct LayoutOf {
  using Ring = typename StepOf<kGroups>::Ring;
  static_assert(StepOf<kGroups>::kStages <= kMaxStages);
  static constexpr int kRingsBehind =
      kBytesBehind / Ring::kBytes < kWarps ? kBytesBehind / Ring::kBytes : kWarps;
  static constexpr uint32_t kBefore = kSumsAt + kGemmMmaPassTiles * kTileRows * kGroups * 8 * 4 +
                                      (kWarps - kRingsBehind) * Ring::kBytes;
  static_assert(kBefore <= kWindow - 1024, "1 KB is the system's");

  /// From the table.
  __device__ static __forceinline__ int ring_at(int warp) {
    return warp < kRingsBehind ? static_cast<int>(PairTable::kBytes) + warp * Ring::kBytes
                               : (kRingsBehind - 1 - warp) * Ring::kBytes;
  }
};

template <class T>
struct GemmMmaParams {
  CUtensorMap codes;
  const T* x;
  int64_t x_stride;
  BlockScales scales;
  TableValues table;
  const T* bias;
  T* y;
  int64_t y_stride;
  int m;
  int n;
  int units;            ///< of a row of W
  int k_warps_inverse;  ///< 65536 / k_warps, rounded up
  const uint8_t* packed;
  GemmMmaPlan plan;
  float* partial_sums;  ///< [slabs - 1, m, tiles * 16]
  uint64_t* flags;      ///< [slabs - 1, parts, passes]
  uint64_t ready;       ///< what a flag is while its sums are there
};

}  // namespace qlora_native::cuda::gemm_mma_kernels
