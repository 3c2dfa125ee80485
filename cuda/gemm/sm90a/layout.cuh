// What the parts of kernel.cuh agree on: sizes, where things lie in shared memory, the barriers, and which parts
// of the product a thread block works on.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>

#include "device/decode.cuh"
#include "device/mbarrier.cuh"
#include "device/pair_table.cuh"
#include "device/warp_reduce.cuh"
#include "gemm/sm90a/operands.h"
#include "gemm/sm90a/out_tile.cuh"
#include "gemm/sm90a/plan.h"
#include "host/table_values.h"

namespace qlora_native::cuda::sm90a {

constexpr int kTileCols = kGemmSm90aTileCols;
constexpr int kStep = 64;  // elements of depth: a box of activations
constexpr int kChunkSteps = kGemmSm90aChunk / kStep;
constexpr int kUnit = 64;  // weights of a row of W: they share a scale
constexpr int kCodeBytes = kTileCols * kGemmSm90aChunk / 2;
constexpr int kPanels = 2;  // of 64 columns of the product
static_assert(kTileCols == kPanels * kPanelRows);
constexpr int kOwners = kGemmSm90aOwners;
static_assert(kOwners == kPanels * kWarpgroup / kWarpSize);
constexpr int kScaleThreads = 2 * kWarpSize;
constexpr int kAlignment = 1024;
constexpr int kTableAt = 65536;  // in the window of shared memory

template <class T, int kTokensOfTile, bool kDoubleQuantized, bool kTransposedWeight>
struct Config {
  using Elem = T;
  static constexpr bool kDoubleQuant = kDoubleQuantized;
  static constexpr bool kTransposed = kTransposedWeight;
  static constexpr int kTokens = kTokensOfTile;
  /// The weights are multiplied by the scales, or the sums of a step are: where they share them.
  static constexpr bool kScalesWeights = kTransposed || kTokens >= 128;
  static constexpr int kTeams = kTokens >= 128 ? 1 : 2;  // with two, each has every other step
  static constexpr int kMultipliers = kTeams * kPanels;  // warpgroups
  static constexpr int kThreads = (kMultipliers + 1) * kWarpgroup;
  static constexpr int kMultiplierRegisters = kTeams == 1 ? (kTokens == 256 ? 216 : 208) : 104;
  static constexpr int kCopierRegisters = kTeams == 1 ? (kTokens == 256 ? 72 : 88) : 64;
  /// What a thread has at the start: setmaxnreg deals out no more.
  static constexpr int kEvenRegisters = kTeams == 1 ? 168 : 96;
  static_assert(kMultipliers * kMultiplierRegisters + kCopierRegisters ==
                (kMultipliers + 1) * kEvenRegisters);
  // A chunk of W: rows of codes, and scales.
  static constexpr int kWeightRows = kTransposed ? kGemmSm90aChunk : kTileCols;
  static constexpr int kWeightUnits = (kTransposed ? kTileCols : kGemmSm90aChunk) / kUnit;
  static constexpr int kCodeRowBytes = kWeightUnits * kUnit / 2;
  static_assert(kWeightRows * kCodeRowBytes == kCodeBytes);
  static constexpr int kScaleBytes = kWeightRows * kWeightUnits * 4;
  static constexpr int kSums = kTokens / 2;
  static constexpr int kBoxBytes = kTokens * kPanelRowBytes;
  static constexpr int kBoxes = kTokens == 256 ? 3 : kTokens == 128 ? 4 : 8;
  static constexpr int kChunks = kTokens == 256 ? 2 : 4;
  static constexpr int kOutBytes = staging_bytes(kTokens);
  // Before the table: barriers, map, staging, scales, some of the boxes. Behind it: chunks, the other boxes.
  static constexpr int kMapAt = 256;
  static constexpr int kOutAt = 2048;
  static constexpr int kScalesAt = kOutAt + kPanels * kOutBytes;
  static constexpr int kBoxesAt = kScalesAt + kChunks * kScaleBytes;
  static constexpr int kBoxesBefore =
      std::min(kBoxes, (kTableAt - kAlignment - kBoxesAt) / kBoxBytes);
  static constexpr uint32_t kCodesAt = PairTable::kBytes;  // from the table
  static constexpr uint32_t kBoxesBehindAt = kCodesAt + kChunks * kCodeBytes;
  static constexpr uint32_t kBehindEnd = kBoxesBehindAt + (kBoxes - kBoxesBefore) * kBoxBytes;
  static constexpr int kSharedBytes = kTableAt + kBehindEnd;
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(2 * (kBoxes + kChunks) * kBarrierBytes <= kMapAt);
};

template <class T>
struct Params {
  CUtensorMap activations;
  CUtensorMap codes;
  TableValues table;
  BlockScales scales;
  OutMatrix<T> out;
  int weight_rows;
  int weight_units;      ///< of 64 elements, of a row of W
  bool scales_are_wide;  ///< those of a row of a chunk can be loaded at once
  GemmSm90aPlan plan;
  float4* partial_sums;  ///< [grid, kSums / 4, kOwners, 32]
  uint64_t* flags;       ///< [grid, kOwners]
  uint64_t ready;        ///< what a flag is while its sums are there
};

/// A thread block's work: segments of tiles, one after another.
class Segments {
 public:
  __device__ __forceinline__ Segments(const GemmSm90aPlan& plan, int block)
      : plan_(plan), at_(plan.first_chunk_of(block)), end_(plan.first_chunk_of(block + 1)) {}

  __device__ __forceinline__ bool next() {
    at_ += chunks;
    if (at_ >= end_) return false;
    tile = at_ / plan_.chunks;
    first = at_ - tile * plan_.chunks;
    chunks = min(plan_.chunks - first, end_ - at_);
    const auto at = TilePosition::of(tile, plan_.row_group, plan_.row_tiles, plan_.col_tiles);
    first_row = at.row * plan_.tile_rows;
    first_col = at.col * kTileCols;
    return true;
  }

  int tile;
  int first;  ///< chunk of the tile
  int chunks = 0;
  int first_row;  ///< of out
  int first_col;

 private:
  const GemmSm90aPlan& plan_;
  int at_;
  int end_;
};

/// Where a chunk of a segment lies in W.
struct WeightBox {
  int row;
  int unit;

  template <class C>
  __device__ __forceinline__ static WeightBox of(const Segments& segment, int chunk) {
    const int depth = (segment.first + chunk) * kGemmSm90aChunk;
    return C::kTransposed ? WeightBox{depth, segment.first_col / kUnit}
                          : WeightBox{segment.first_col, depth / kUnit};
  }
};

/// The barriers, and where things lie in shared memory.
template <class C>
struct Shared {
  uint32_t base;
  uint32_t table;
  __device__ __forceinline__ uint32_t box(int slot) const {
    return slot < C::kBoxesBefore
               ? base + C::kBoxesAt + slot * C::kBoxBytes
               : table + C::kBoxesBehindAt + (slot - C::kBoxesBefore) * C::kBoxBytes;
  }
  __device__ __forceinline__ uint32_t codes(int slot) const {
    return table + C::kCodesAt + slot * kCodeBytes;
  }
  __device__ __forceinline__ uint32_t scales(int slot) const {
    return base + C::kScalesAt + slot * C::kScaleBytes;
  }
  __device__ __forceinline__ uint32_t out(int multiplier) const {
    return base + C::kOutAt + multiplier * C::kOutBytes;
  }
  __device__ __forceinline__ uint32_t map() const { return base + C::kMapAt; }
  __device__ __forceinline__ uint32_t box_full(int slot) const { return barrier(slot); }
  __device__ __forceinline__ uint32_t box_empty(int slot) const {
    return barrier(C::kBoxes + slot);
  }
  __device__ __forceinline__ uint32_t chunk_full(int slot) const {
    return barrier(2 * C::kBoxes + slot);
  }
  __device__ __forceinline__ uint32_t chunk_empty(int slot) const {
    return barrier(2 * C::kBoxes + C::kChunks + slot);
  }
  __device__ __forceinline__ uint32_t barrier(int index) const {
    return base + index * kBarrierBytes;
  }
};

}  // namespace qlora_native::cuda::sm90a
