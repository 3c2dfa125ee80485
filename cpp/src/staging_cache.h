// Pinned memory: the device sees copies of host bytes in a staging cache of a fixed size. What was
// written there goes back to the host when its place is needed; the least recently used goes first.
//
// Order. Copies to the device and to the host have a stream each, so that both directions run at
// once. A place is free again, and the bytes that were in it are on the host, once the to-host
// stream has passed `vacated_`: whatever is copied to the device afterwards waits for that. So
// the one event orders the reuse of places, of host bytes, and of deallocated memory.
#pragma once

#include <list>
#include <map>
#include <optional>

#include "acquire_plan.h"
#include "paged_mover.h"
#include "region_allocator.h"

namespace qlora_native {

class StagingCache final : public PagedMover {
 public:
  StagingCache(PagedDriver& driver, int64_t budget_bytes);
  ~StagingCache() override;
  StagingCache(const StagingCache&) = delete;
  StagingCache& operator=(const StagingCache&) = delete;

  void acquire(std::span<const PagedRange> ranges, Access access, std::span<void*> addresses,
               Stream stream) override;
  void release(std::span<const PagedRange> ranges, Stream stream) override;
  void prefetch(std::span<const PagedRange> ranges) override;
  void evict(std::span<const PagedRange> ranges, Stream stream) override;
  void plan(std::span<const PagedRange> ranges) override;
  void show_to_host(PagedRange range, Stream stream) override;
  PagedEvent forget(PagedRange range) override;
  void add_to(PagedPoolStats* stats) const override;

 private:
  struct Use {
    Stream stream;
    PagedEvent event;
  };
  struct Entry {
    int64_t size_bytes = 0;
    char* place = nullptr;
    int acquired = 0;
    bool is_filled = false;  ///< holds bytes: copied there, or written by who acquired it to write
    bool is_dirty = false;   ///< newer than the host's
    /// When the bytes are in their place, or, for those that are going to be written, when the place
    /// is free. Null once `uses` say so.
    PagedEvent ready;
    std::vector<Use> uses;  ///< the last release on each stream
    uint64_t wish = 0;      ///< brought for the plan or prefetch of this number
    std::list<char*>::iterator recency;

    void add_use(Stream stream, const PagedEvent& event);
  };
  using Entries = std::map<char*, Entry>;  ///< by host address; disjoint

  Entries::iterator containing(PagedRange range);
  std::vector<Entries::iterator> overlapping(PagedRange range);

  void take_arena();
  /// Room in the arena, at the expense of the least recently used that is not acquired. What was
  /// brought for the present wish goes last, or not at all. Null when there is none.
  char* make_place(int64_t size_bytes, bool spares_wishes);
  /// Makes a copy of `range`, of which no part has one; the end when there is no room.
  Entries::iterator insert(PagedRange range, bool with_bytes, bool spares_wishes);
  /// Ends copies: all, or, when it throws, none. Dirty ones are written back unless discarded.
  void vacate(std::span<const Entries::iterator> positions, bool is_discarded = false);
  void erase(Entries::iterator position);

  void* acquire_one(PagedRange range, Access access, Stream stream);
  void undo_acquire(Entries::iterator position);
  /// Ranges that were released together have one event: an acquire waits for it once. It waits for
  /// releases on its own stream too: a handle does not tell a stream from an ended one.
  void wait_once(Stream stream, const PagedEvent& event);
  /// Brings ranges, in order, as far as there is room beside the acquired and the wished for.
  /// Returns how many of them are there.
  size_t bring(std::span<const PagedRange> ranges);

  PagedDriver& driver_;
  int64_t arena_bytes_;
  char* arena_ = nullptr;
  RegionAllocator places_;
  Entries entries_;
  std::list<char*> recency_;  ///< the least recently used first
  PagedEvent vacated_;
  PagedEvent waited_for_;        ///< by the present acquire, last
  bool has_stray_copy_ = false;  ///< one to the device failed after it was queued
  AcquirePlan plan_;
  uint64_t wish_ = 1;  ///< the number of the present plan or prefetch
  int64_t resident_bytes_ = 0;
  int64_t prefetches_ = 0;
  int64_t evictions_ = 0;
  int64_t bytes_to_device_ = 0;
  int64_t bytes_to_host_ = 0;
};

}  // namespace qlora_native
