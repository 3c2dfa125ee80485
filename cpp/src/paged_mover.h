// What moves a pool's bytes: one implementation per backing, over a driver. The pool has checked
// that ranges lie in live allocations and holds its mutex.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "paged_driver.h"
#include "qlora_native/memory.h"

namespace qlora_native {

class PagedMover {
 public:
  virtual ~PagedMover() = default;

  // As the functions of PagedPool.
  virtual void acquire(std::span<const PagedRange> ranges, Access access,
                       std::span<void*> addresses, Stream stream) = 0;
  virtual void release(std::span<const PagedRange> ranges, Stream stream) = 0;
  virtual void prefetch(std::span<const PagedRange> ranges) = 0;
  virtual void evict(std::span<const PagedRange> ranges, Stream stream) = 0;
  virtual void plan(std::span<const PagedRange> ranges) = 0;
  virtual void show_to_host(PagedRange range, Stream stream) = 0;

  /// The bytes are no longer wanted; they are not acquired. Returns what has to pass before their
  /// memory is used for something else, null for nothing.
  virtual PagedEvent forget(PagedRange range) = 0;

  /// Fills in what it counts of the statistics.
  virtual void add_to(PagedPoolStats* stats) const = 0;
};

/// The mover of the driver's backing; the driver outlives it.
std::unique_ptr<PagedMover> make_mover(PagedDriver& driver, int64_t device_budget_bytes);

}  // namespace qlora_native
