// What the handles and buffers of one pool share: regions, allocations, checks, the mutex. Knows no
// device: the driver does.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "paged_driver.h"
#include "paged_mover.h"
#include "qlora_native/memory.h"
#include "region_allocator.h"

namespace qlora_native::detail {

class PagedPoolState {
 public:
  PagedPoolState(const PagedPoolOptions& options, std::unique_ptr<PagedDriver> driver);
  ~PagedPoolState();
  PagedPoolState(const PagedPoolState&) = delete;
  PagedPoolState& operator=(const PagedPoolState&) = delete;

  Device device() const noexcept { return options_.device; }
  Backing backing() const noexcept { return backing_; }

  // As the functions of PagedPool.
  void* allocate(int64_t size_bytes, Stream stream);
  void deallocate(void* data, Stream stream);
  void prefetch(std::span<const PagedRange> ranges, Stream stream);
  void evict(std::span<const PagedRange> ranges, Stream stream);
  void plan(std::span<const PagedRange> ranges);
  void acquire(std::span<const PagedRange> ranges, Access access, std::span<void*> addresses,
               Stream stream);
  void release(std::span<const PagedRange> ranges, Stream stream);
  void* host_view(PagedRange range, Stream stream);
  void trim();
  PagedPoolStats stats() const;

  /// For destructors: what deallocate throws leaves the bytes to the end of the pool.
  void deallocate_quietly(void* data, Stream stream) noexcept;

 private:
  struct Allocation {
    int64_t size_bytes;
    int acquired = 0;
  };
  /// Deallocated memory that work may still use.
  struct Pending {
    char* data;
    int64_t size_bytes;
    Stream stream;
    bool is_recorded;  ///< false: `stream` was being captured, and is asked again
    PagedEvent used;
    PagedEvent moved;
  };

  bool is_foreign_process() const noexcept;
  /// Locks, and refuses to serve a forked child: its lock may be held by a thread it does not have.
  std::unique_lock<std::mutex> lock(const char* function) const;
  void refuse_capture(const char* function, Stream stream) const;
  Allocation& allocation_of(const char* function, PagedRange range);
  void check(const char* function, std::span<const PagedRange> ranges);

  char* take(int64_t rounded_bytes);
  void add_region(int64_t rounded_bytes);
  bool is_over(Pending& pending);
  void collect();
  void return_regions(int kept);
  std::string describe() const;
  PagedPoolStats count() const;

  const PagedPoolOptions options_;
  const unsigned process_;  ///< that made the pool, see fork_generation
  std::unique_ptr<PagedDriver> driver_;
  const Backing backing_;
  mutable std::mutex mutex_;
  std::map<char*, Allocation> allocations_;
  RegionAllocator regions_;
  std::vector<Pending> pending_;
  std::unique_ptr<PagedMover> mover_;
  int64_t used_bytes_ = 0;
  int64_t peak_used_bytes_ = 0;
};

}  // namespace qlora_native::detail
