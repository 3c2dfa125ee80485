// What the parts of gemm_transposed_sm90a.cu agree on: sizes, where things lie in shared memory, the barriers, and
// which part of the product a thread block works on.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "device/decode.cuh"
#include "device/mbarrier.cuh"
#include "device/warp_reduce.cuh"
#include "device/wgmma.cuh"
#include "gemm/sm90a/operands.h"
#include "gemm/sm90a/out_tile.cuh"
#include "gemm/sm90a/transposed/plan.h"

namespace qlora_native::cuda::sm90a::transposed {

constexpr int kMultipliers = 2;
constexpr int kDecoders = 2;
// What threads have where registers are dealt out: 256 * 160 + 256 * 96 = 512 * 128 at the start.
constexpr int kMultiplierRegisters = 160;
constexpr int kDecoderRegisters = 96;
constexpr int kPanelBytes = kPanelRows * kPanelRowBytes;
constexpr int kWeightBytes = kMultipliers * kPanelBytes;
constexpr int kTileCols = kGemmTransposedTileCols;
static_assert(kTileCols == kMultipliers * kPanelRows);
constexpr int kStep = kGemmTransposedStep;
constexpr int kChunkRowBytes = 64;  // 128 columns of W
constexpr int kAlignment = 1024;

template <class T, int kTokensOfTile, bool kDoubleQuantized>
struct Config {
  using Elem = T;
  static constexpr bool kDoubleQuant = kDoubleQuantized;
  static constexpr int kTokens = kTokensOfTile;
  static constexpr int kSums = kTokens / 2;  // of a multiplier's thread
  // One instruction for 256 tokens would need more registers than a thread has at the start.
  static constexpr int kHalves = kTokens == 256 ? 2 : 1;
  static constexpr int kSumsOfHalf = kSums / kHalves;
  using Sums = float[kHalves][kSumsOfHalf];
  // The widest sums need more registers than an even share, and leave none for more warps: decoders give some
  // of theirs and start the copies.
  static constexpr bool kDealsRegisters = kTokens == 256;
  static constexpr bool kHasCopier = !kDealsRegisters;
  static constexpr int kThreads =
      (kMultipliers + kDecoders) * kWarpgroup + (kHasCopier ? 2 * kWarpSize : 0);

  static constexpr int kActivationBytes = kTokens * kPanelRowBytes;
  static constexpr int kStages = 4;
  // Boxes are small where products are quick: many have to be on their way.
  static constexpr int kBoxes = kTokens == 16 ? 16 : kTokens == 64 ? 8 : kStages;
  static constexpr int kChunkBytes = kPanelRows * kChunkRowBytes;  // of a step
  static constexpr int kOutBytes = staging_bytes(kTokens);         // of a multiplier

  static constexpr int kBoxesAt = kStages * kWeightBytes;
  static constexpr int kOutAt = kBoxesAt + kBoxes * kActivationBytes;
  static constexpr int kChunksAt = kOutAt + kMultipliers * kOutBytes;
  static constexpr int kOtherBytes = 1024 + 768;  // the map, barriers
  static constexpr uint32_t kChunksThatFit =
      (kMaxSharedBytes - kAlignment - kChunksAt - kOtherBytes) / kChunkBytes;
  static constexpr int kChunks =
      kChunksThatFit < 4 ? kChunksThatFit : std::bit_floor(std::min(kChunksThatFit, 16u));
  static constexpr int kMapAt = kChunksAt + kChunks * kChunkBytes;
  static constexpr int kBarriersAt = kMapAt + 1024;
  static constexpr int kSharedBytes = kBarriersAt + 768 + kAlignment;
  static_assert(kSharedBytes <= kMaxSharedBytes && kChunks >= 2);
  static_assert(2 * (kStages + kBoxes + kChunks) * kBarrierBytes <= 768);

  // Sums of a split tile: [kTokens][kSumsPitch] floats, where stages and boxes were. The pitch spreads the
  // fragments of wgmma over the banks.
  static constexpr int kSumsPitch = kTileCols + 4;
  static_assert(kTokens * kSumsPitch * 4 <= kOutAt);
};

template <class T>
struct GemmParams {
  CUtensorMap activations;
  CUtensorMap codes;
  float values[16];
  BlockScales scales;
  OutMatrix<T> out;
  int weight_rows;
  int weight_units;  ///< of 64 elements, of a row of W
  GemmTransposedPlan plan;
};

/// Where the thread block's share of a work item lies.
struct Work {
  int first_col;  // of out
  int first_row;
  int first_step;
  int steps;
};

__device__ __forceinline__ Work work_of(const GemmTransposedPlan& plan, int item, int rank) {
  const auto at = TilePosition::of(item, plan.row_group, plan.row_tiles, plan.col_items);
  Work work;
  work.first_row = at.row * plan.tile_rows;
  if (plan.split) {
    work.first_col = at.col * kTileCols;
    const int pairs = plan.steps / 2;
    const int first_pair = rank * pairs / plan.cluster;
    work.first_step = first_pair * 2;
    work.steps = ((rank + 1) * pairs / plan.cluster - first_pair) * 2;
  } else {
    work.first_col = (at.col * plan.cluster + rank) * kTileCols;
    work.first_step = 0;
    work.steps = plan.steps;
  }
  return work;
}

/// The barriers, and where things lie in shared memory.
template <class C>
struct Shared {
  uint32_t base;

  __device__ __forceinline__ uint32_t weights(int stage) const {
    return base + stage * kWeightBytes;
  }
  __device__ __forceinline__ uint32_t box(int slot) const {
    return base + C::kBoxesAt + slot * C::kActivationBytes;
  }
  __device__ __forceinline__ uint32_t out(int multiplier) const {
    return base + C::kOutAt + multiplier * C::kOutBytes;
  }
  __device__ __forceinline__ uint32_t chunk(int slot) const {
    return base + C::kChunksAt + slot * C::kChunkBytes;
  }
  __device__ __forceinline__ uint32_t map() const { return base + C::kMapAt; }
  /// The panels of a stage are there / have been used.
  __device__ __forceinline__ uint32_t full(int stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barrier(C::kStages + stage); }
  /// The same of a box.
  __device__ __forceinline__ uint32_t box_full(int slot) const {
    return barrier(2 * C::kStages + slot);
  }
  __device__ __forceinline__ uint32_t box_empty(int slot) const {
    return barrier(2 * C::kStages + C::kBoxes + slot);
  }
  /// The same of a chunk.
  __device__ __forceinline__ uint32_t chunk_full(int slot) const {
    return barrier(2 * (C::kStages + C::kBoxes) + slot);
  }
  __device__ __forceinline__ uint32_t chunk_empty(int slot) const {
    return barrier(2 * (C::kStages + C::kBoxes) + C::kChunks + slot);
  }

 private:
  __device__ __forceinline__ uint32_t barrier(int index) const {
    return base + C::kBarriersAt + index * kBarrierBytes;
  }
};

template <class C>
__device__ __forceinline__ void init_barriers(const Shared<C>& shared,
                                              const GemmTransposedPlan& plan) {
  constexpr int kWarps = kWarpgroup / kWarpSize;
  const int sharers = plan.split ? 1 : plan.cluster;  // of the activations
  for (int stage = 0; stage < C::kStages; ++stage) {
    init_barrier(shared.full(stage), kWarps);
    init_barrier(shared.empty(stage), kMultipliers * kWarps);
  }
  for (int slot = 0; slot < C::kBoxes; ++slot) {
    init_barrier(shared.box_full(slot), 1);
    init_barrier(shared.box_empty(slot), kMultipliers * kWarps * sharers);
  }
  for (int slot = 0; slot < C::kChunks; ++slot) {
    init_barrier(shared.chunk_full(slot), 1);
    init_barrier(shared.chunk_empty(slot), kWarps);
  }
  publish_barriers();
}

}  // namespace qlora_native::cuda::sm90a::transposed
