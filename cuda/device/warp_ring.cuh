// Rows of global memory on their way to one warp: a ring of stages in shared memory that the bulk
// copy engine fills (sm_90 and newer).
#pragma once

#include <cstdint>

#include "device/mbarrier.cuh"

namespace qlora_native::cuda {

/// A ring of `kStages` stages of kRows rows of kRowBytes bytes, owned by one warp, all of whose
/// lanes call every function. Stages are filled and used in turn. Before a stage is filled again
/// all lanes must have read it (`__syncwarp`).
template <int kStages, int kRows, int kRowBytes>
class WarpRing {
 public:
  static constexpr int kStageBytes = kRows * kRowBytes;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kBarriersBytes = kStages * kBarrierBytes;

  /// Makes the barriers: before the warp's first access to global memory, for which the fence
  /// would wait. `data` is 16-byte aligned, `barriers` 8-byte.
  __device__ __forceinline__ WarpRing(uint32_t data, uint32_t barriers, int lane)
      : data_(data), barriers_(barriers), lane_(lane) {
    if (lane < kStages) init_barrier(barriers + lane * kBarrierBytes, 1);
    publish_barriers();
    __syncwarp();
  }

  /// Starts to copy `bytes` (a multiple of 16, at most kRowBytes) to each row of the next stage.
  /// `source_of(row)` is a row's 16-byte aligned address. The rest of a row keeps what it held.
  template <class SourceOf>
  __device__ __forceinline__ void fill(int bytes, const SourceOf& source_of) {
    const uint32_t stage = data_ + fill_slot_ * kStageBytes;
    const uint32_t barrier = barriers_ + fill_slot_ * kBarrierBytes;
    if (lane_ == 0) arrive_and_expect(barrier, bytes * kRows);
    if (lane_ < kRows) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
          "[%3];" ::"r"(stage + lane_ * kRowBytes),
          "l"(source_of(lane_)), "r"(bytes), "r"(barrier)
          : "memory");
    }
    fill_slot_ = fill_slot_ == kStages - 1 ? 0 : fill_slot_ + 1;
  }

  /// Waits until the next stage is full and returns its address.
  __device__ __forceinline__ uint32_t acquire() {
    wait_barrier(barriers_ + use_slot_ * kBarrierBytes, parity_);
    const uint32_t stage = data_ + use_slot_ * kStageBytes;
    if (++use_slot_ == kStages) {
      use_slot_ = 0;
      parity_ ^= 1;
    }
    return stage;
  }

 private:
  uint32_t data_;
  uint32_t barriers_;
  int lane_;
  int fill_slot_ = 0;
  int use_slot_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace qlora_native::cuda
