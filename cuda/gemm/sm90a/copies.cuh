// Copies of activations and codes for kernel.cuh, each started by one thread.
#pragma once

#include <cstdint>

#include "device/mbarrier.cuh"
#include "device/tensor_copy.cuh"
#include "gemm/sm90a/layout.cuh"

namespace qlora_native::cuda::sm90a {

template <class C>
__device__ __forceinline__ void copy_boxes(const Params<typename C::Elem>& p,
                                           const Shared<C>& shared, int block) {
  RingPosition<C::kBoxes> at;
  for (Segments segment(p.plan, block); segment.next();) {
    for (int step = 0; step < segment.chunks * kChunkSteps; ++step, ++at.count) {
      const int slot = at.slot();
      wait_barrier(shared.box_empty(slot), at.round() ^ 1);
      const uint32_t full = shared.box_full(slot);
      arrive_and_expect(full, C::kBoxBytes);
      copy_box(shared.box(slot), p.activations, (segment.first * kChunkSteps + step) * kStep,
               segment.first_row, full);
    }
  }
}

template <class C>
__device__ __forceinline__ void copy_codes(const Params<typename C::Elem>& p,
                                           const Shared<C>& shared, int block) {
  RingPosition<C::kChunks> at;
  for (Segments segment(p.plan, block); segment.next();) {
    for (int chunk = 0; chunk < segment.chunks; ++chunk, ++at.count) {
      const int slot = at.slot();
      wait_barrier(shared.chunk_empty(slot), at.round() ^ 1);
      const uint32_t full = shared.chunk_full(slot);
      arrive_and_expect(full, kCodeBytes);
      const auto box = WeightBox::of<C>(segment, chunk);
      copy_box(shared.codes(slot), p.codes, box.unit * (kUnit / 2), box.row, full);
    }
  }
}

}  // namespace qlora_native::cuda::sm90a
