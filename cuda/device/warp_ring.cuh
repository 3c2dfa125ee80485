// Memory on its way to one warp: a ring of stages in shared memory that the copy engine fills (sm_90
// and newer). The engine takes about nine clocks a copy whatever its size, and a lane's addresses travel
// through uniform registers: few, long copies, started by one lane.
#pragma once

#include <cstdint>

#include "device/mbarrier.cuh"
#include "device/warp_uniform.cuh"

namespace qlora_native::cuda {

/// A ring of `kStages` stages of kStageBytes bytes, owned by one warp, all of whose lanes call every
/// function with uniform arguments; others may `peek`. Stages are filled and used in turn. Before a stage is filled
/// again all lanes must have read it (`__syncwarp`).
template <int kStages, int kStageBytes>
class WarpRing {
 public:
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kBarriersBytes = kStages * kBarrierBytes;

  /// `data` is aligned to 128 bytes, `barriers` to 8.
  __device__ __forceinline__ WarpRing(uint32_t data, uint32_t barriers)
      : data_(data), barriers_(barriers) {}

  /// Makes the barriers, once. Before the warp's first access to global memory, for which the fence
  /// would wait.
  __device__ __forceinline__ void init() const {
    if (elect_lane()) {
#pragma unroll
      for (int slot = 0; slot < kStages; ++slot) init_barrier(barrier(slot), 1);
    }
    publish_barriers();
    __syncwarp();
  }

  /// Fills the next stage: in one lane, `copy(stage, barrier)` starts a copy of `bytes`.
  template <class Copy>
  __device__ __forceinline__ void fill(int bytes, const Copy& copy) {
    if (elect_lane()) {
      arrive_and_expect(barrier(fill_slot_), bytes);
      copy(stage(fill_slot_), barrier(fill_slot_));
    }
    fill_slot_ = fill_slot_ == kStages - 1 ? 0 : fill_slot_ + 1;
  }

  /// Waits until the next stage is full and returns its address.
  __device__ __forceinline__ uint32_t acquire() {
    wait_barrier(barrier(use_slot_), parity_);
    const uint32_t acquired = stage(use_slot_);
    if (++use_slot_ == kStages) {
      use_slot_ = 0;
      parity_ ^= 1;
    }
    return acquired;
  }

  /// Waits for what is filled first into stage `slot`, and returns its address: for any warp, after a
  /// barrier of the block that follows `init`. The owner fills the stage again only after another
  /// one; it acquires the stage as well.
  __device__ __forceinline__ uint32_t peek(int slot) const {
    wait_barrier(barrier(slot), 0);
    return stage(slot);
  }

 private:
  __device__ __forceinline__ uint32_t stage(int slot) const { return data_ + slot * kStageBytes; }
  __device__ __forceinline__ uint32_t barrier(int slot) const {
    return barriers_ + slot * kBarrierBytes;
  }

  uint32_t data_;
  uint32_t barriers_;
  int fill_slot_ = 0;
  int use_slot_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace qlora_native::cuda
