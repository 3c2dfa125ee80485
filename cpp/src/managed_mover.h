// Managed memory: moves pages in bulk, so that a kernel does not meet them one fault at a time.
// Host and device see the same bytes wherever the pages are: order is a matter of speed, except
// between two movements of the same pages.
#pragma once

#include "acquire_plan.h"
#include "byte_set.h"
#include "paged_mover.h"

namespace qlora_native {

class ManagedMover final : public PagedMover {
 public:
  /// How far `plan` looks ahead, at most and at least: enough to keep the link busy, too little to
  /// crowd others out, and many ranges with one call of the driver.
  static constexpr int64_t kLookAheadBytes = int64_t{64} << 20;
  static constexpr int64_t kLeastAheadBytes = kLookAheadBytes / 2;

  explicit ManagedMover(PagedDriver& driver) : driver_(driver) {}

  void acquire(std::span<const PagedRange> ranges, Access access, std::span<void*> addresses,
               Stream stream) override;
  void release(std::span<const PagedRange>, Stream) override {}
  void prefetch(std::span<const PagedRange> ranges) override;
  void evict(std::span<const PagedRange> ranges, Stream stream) override;
  void plan(std::span<const PagedRange> ranges) override;
  void show_to_host(PagedRange range, Stream stream) override;
  PagedEvent forget(PagedRange range) override;
  void add_to(PagedPoolStats* stats) const override;

 private:
  /// Moves what is not there; returns how many ranges were not.
  int64_t bring(std::span<const PagedRange> ranges);
  void look_ahead(std::span<const PagedRange> acquired);

  PagedDriver& driver_;
  ByteSet resident_;
  PagedEvent brought_;  ///< the last movement to the device; null when it is known to be over
  PagedEvent moved_away_;
  AcquirePlan plan_;
  int64_t prefetches_ = 0;
  int64_t evictions_ = 0;
  int64_t bytes_to_device_ = 0;
  int64_t bytes_to_host_ = 0;
};

}  // namespace qlora_native
