// The decoders of gemm_transposed_sm90a.cu: from chunks of codes to panels of weights.
#pragma once

#include <cstdint>

#include "device/decode.cuh"
#include "device/grid_dependency.cuh"
#include "device/mbarrier.cuh"
#include "device/scaled_table.cuh"
#include "device/shared_memory.cuh"
#include "device/tensor_copy.cuh"
#include "gemm/sm90a/transposed/copies.cuh"
#include "gemm/sm90a/transposed/layout.cuh"

namespace qlora_native::cuda::sm90a::transposed {

/// A row of a panel for every step: which one of W, and its scales two steps ahead.
template <class C>
class PanelRow {
 public:
  using Params = GemmParams<typename C::Elem>;

  __device__ __forceinline__ PanelRow(const Params& p, const Work& work, int thread)
      : p_(p),
        first_row_(thread % kPanelRows),
        unit_(work.first_col / kStep + thread / kPanelRows) {}

  __device__ __forceinline__ RawScale load_scale(int step) const {
    const uint32_t block =
        min(row(step), p_.weight_rows - 1) * static_cast<uint32_t>(p_.weight_units) +
        min(unit_, p_.weight_units - 1);
    const uint32_t index = block >> (p_.scales.block_shift - 6);
    if constexpr (C::kDoubleQuant) {
      return {load_after_wait(p_.scales.absmax2 + index / kGroupSize),
              load_after_wait(p_.scales.codes + index)};
    }
    return {load_after_wait(p_.scales.values + index), 0};
  }

  /// 0 past the end of W: what is not there adds nothing.
  __device__ __forceinline__ float scale(RawScale raw, uint32_t map, float offset, int step) const {
    float scale = raw.value;
    if constexpr (C::kDoubleQuant) {
      scale = decode_scale(load_shared(map + raw.code * 4), raw.value, offset);
    }
    return row(step) < p_.weight_rows && unit_ < p_.weight_units ? scale : 0.0f;
  }

 private:
  __device__ __forceinline__ int row(int step) const { return first_row_ + step * kStep; }

  const Params& p_;
  int first_row_;
  int unit_;
};

template <class C>
__device__ __forceinline__ void decode(const GemmParams<typename C::Elem>& p,
                                       const Shared<C>& shared, int cluster, int rank, int decoder,
                                       int thread) {
  const auto& plan = p.plan;
  const int lane = thread % kWarpSize;
  const float offset = C::kDoubleQuant ? load_after_wait(p.scales.offset) : 0.0f;
  // A row of 32 bytes of codes in a chunk, the first or the second half of the chunk's: two pieces of 16 bytes,
  // swizzled by 64 bytes.
  const int chunk_row = thread % kPanelRows;
  const int row_swizzle = chunk_row / 2 % 4;
  const uint32_t target_row = thread * kPanelRowBytes;
  // Without a copier one decoder starts the copies of chunks, the other those of boxes.
  ChunkCopies<C> chunk_copies(p, shared, cluster, rank);
  BoxCopies<C> box_copies(p, shared, cluster, rank);
  const bool copies_chunks = !C::kHasCopier && decoder == 0 && thread == 0;
  const bool copies_boxes = !C::kHasCopier && decoder == 1 && thread == 0;
  if (copies_chunks) {
    for (int i = 0; i < C::kChunks - 1; ++i) chunk_copies.start_next();
  }
  if (copies_boxes) {
    for (int i = 0; i < C::kBoxes; ++i) box_copies.start_next();
  }
  RingPosition<C::kStages> stage_at;
  RingPosition<C::kChunks> chunk_at;
  stage_at.count = decoder;
  chunk_at.count = decoder;
  uint32_t to_publish = 0;  // barrier of the stage that was written last
  for (int item = cluster; item < plan.items; item += plan.clusters) {
    const Work work = work_of(plan, item, rank);
    const PanelRow<C> row(p, work, thread);
    const auto load_scale = [&](int i) {
      return row.load_scale(work.first_step + min(i, work.steps - 1));
    };
    RawScale raw = load_scale(decoder);
    RawScale next = load_scale(decoder + kDecoders);
    for (int i = decoder; i < work.steps; i += kDecoders) {
      const int step = work.first_step + i;
      const float scale = row.scale(raw, shared.map(), offset, step);
      raw = next;
      const ScaledTable table = ScaledTable::make<typename C::Elem>(p.values, scale);

      const int half = thread / kPanelRows;
      wait_barrier(shared.chunk_full(chunk_at.slot()), chunk_at.round());
      const uint32_t source = shared.chunk(chunk_at.slot()) + chunk_row * kChunkRowBytes;
      const uint4 first = load_shared4(source + (half * 2 ^ row_swizzle) * 16);
      const uint4 second = load_shared4(source + ((half * 2 + 1) ^ row_swizzle) * 16);
      const uint4 pieces[8] = {table.decode(first.x),  table.decode(first.y),
                               table.decode(first.z),  table.decode(first.w),
                               table.decode(second.x), table.decode(second.y),
                               table.decode(second.z), table.decode(second.w)};

      // The stage before is published only now, when the stores to it are long done: the fence waits
      // for them, and for loads.
      publish_to_async_proxy();
      next = load_scale(i + 2 * kDecoders);
      __syncwarp();
      if (lane == 0) {
        if (to_publish != 0) arrive(to_publish);
        arrive(shared.chunk_empty(chunk_at.slot()));
      }
      to_publish = shared.full(stage_at.slot());

      wait_barrier(shared.empty(stage_at.slot()), stage_at.round() ^ 1);
      if (copies_chunks) {
        for (int copy = 0; copy < kDecoders; ++copy) chunk_copies.start_next();
      }
      // The box of as many steps ago has been multiplied, like the panels.
      if (copies_boxes && stage_at.count >= C::kBoxes) {
        for (int copy = 0; copy < kDecoders; ++copy) box_copies.start_next();
      }
      const uint32_t target = shared.weights(stage_at.slot()) + target_row;
#pragma unroll
      for (int i = 0; i < 8; ++i) store_shared(target + (i ^ (thread % 8)) * 16, pieces[i]);

      stage_at.count += kDecoders;
      chunk_at.count = stage_at.count;
    }
  }
  publish_to_async_proxy();
  __syncwarp();
  if (lane == 0 && to_publish != 0) arrive(to_publish);
}

}  // namespace qlora_native::cuda::sm90a::transposed
