// Copies of activations and codes for gemm_transposed_sm90a.cu, each started by one thread.
#pragma once

#include <cstdint>

#include "device/mbarrier.cuh"
#include "device/tensor_copy.cuh"
#include "gemm/sm90a/transposed/layout.cuh"

namespace qlora_native::cuda::sm90a::transposed {

/// The boxes or chunks of all of the thread block's steps, in turn.
template <int kSlots>
class CopySequence {
 public:
  __device__ __forceinline__ CopySequence(const GemmTransposedPlan& plan, int cluster, int rank)
      : plan_(plan), rank_(rank), item_(cluster), work_(work_of(plan, item_, rank)) {}

  /// Calls start(work, step, slot) for the next one as soon as its slot's barrier says that there is room. False
  /// when there is none left.
  template <class EmptyBarrier, class Start>
  __device__ __forceinline__ bool start_next(const EmptyBarrier& empty, const Start& start) {
    if (step_ == work_.steps) {
      item_ += plan_.clusters;
      if (item_ >= plan_.items) return false;
      work_ = work_of(plan_, item_, rank_);
      step_ = 0;
    }
    wait_barrier(empty(at_.slot()), at_.round() ^ 1);
    start(work_, work_.first_step + step_, at_.slot());
    ++step_;
    ++at_.count;
    return true;
  }

 private:
  const GemmTransposedPlan& plan_;
  int rank_;
  int item_;
  Work work_;
  int step_ = 0;  ///< of the work
  RingPosition<kSlots> at_;
};

template <class C>
class BoxCopies {
 public:
  __device__ __forceinline__ BoxCopies(const GemmParams<typename C::Elem>& p,
                                       const Shared<C>& shared, int cluster, int rank)
      : p_(p), shared_(shared), rank_(rank), sequence_(p.plan, cluster, rank) {}

  __device__ __forceinline__ bool start_next() {
    return sequence_.start_next(
        [&](int slot) { return shared_.box_empty(slot); },
        [&](const Work& work, int step, int slot) {
          const uint32_t full = shared_.box_full(slot);
          arrive_and_expect(full, C::kActivationBytes);
          if (p_.plan.cluster > 1 && !p_.plan.split) {
            constexpr int kHalf = C::kTokens / 2;
            copy_box_to_ranks(shared_.box(slot) + rank_ * kHalf * kPanelRowBytes, p_.activations,
                              step * kStep, work.first_row + rank_ * kHalf, full, 3);
          } else {
            copy_box(shared_.box(slot), p_.activations, step * kStep, work.first_row, full);
          }
        });
  }

 private:
  const GemmParams<typename C::Elem>& p_;
  const Shared<C>& shared_;
  int rank_;
  CopySequence<C::kBoxes> sequence_;
};

template <class C>
class ChunkCopies {
 public:
  __device__ __forceinline__ ChunkCopies(const GemmParams<typename C::Elem>& p,
                                         const Shared<C>& shared, int cluster, int rank)
      : p_(p), shared_(shared), sequence_(p.plan, cluster, rank) {}

  __device__ __forceinline__ bool start_next() {
    return sequence_.start_next([&](int slot) { return shared_.chunk_empty(slot); },
                                [&](const Work& work, int step, int slot) {
                                  const uint32_t full = shared_.chunk_full(slot);
                                  arrive_and_expect(full, C::kChunkBytes);
                                  copy_box(shared_.chunk(slot), p_.codes, work.first_col / 2,
                                           step * kStep, full);
                                });
  }

 private:
  const GemmParams<typename C::Elem>& p_;
  const Shared<C>& shared_;
  CopySequence<C::kChunks> sequence_;
};

}  // namespace qlora_native::cuda::sm90a::transposed
