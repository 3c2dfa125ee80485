#include "managed_mover.h"

namespace qlora_native {
namespace {

/// Joins ranges that only the padding between allocations keeps apart, which is the pool's too:
/// each call of the driver costs more than moving the padding. (Regions lie further apart.)
class JoinedRanges {
 public:
  void add(PagedRange range) {
    if (!ranges_.empty()) {
      PagedRange& last = ranges_.back();
      const int64_t gap =
          static_cast<char*>(range.data) - static_cast<char*>(last.data) - last.size_bytes;
      if (gap >= 0 && gap < kPagedAlignment) {
        last.size_bytes += gap + range.size_bytes;
        return;
      }
    }
    ranges_.push_back(range);
  }
  const std::vector<PagedRange>& get() const { return ranges_; }

 private:
  std::vector<PagedRange> ranges_;
};

}  // namespace

void ManagedMover::acquire(std::span<const PagedRange> ranges, Access, std::span<void*> addresses,
                           Stream stream) {
  for (size_t i = 0; i < ranges.size(); ++i) addresses[i] = ranges[i].data;
  // A graph is replayed later: what it finds then depends on nothing that is moved now, and an event
  // from outside would end the capture.
  if (driver_.is_capturing(stream)) return;
  bring(ranges);
  if (brought_) {
    if (driver_.is_done(brought_)) {
      brought_ = nullptr;
    } else {
      driver_.wait(stream, brought_);
    }
  }
  look_ahead(ranges);
}

void ManagedMover::prefetch(std::span<const PagedRange> ranges) { prefetches_ += bring(ranges); }

int64_t ManagedMover::bring(std::span<const PagedRange> ranges) {
  JoinedRanges missing;
  int64_t count = 0;
  for (const PagedRange& range : ranges) {
    bool is_there = true;
    resident_.for_each_gap(range, [&](PagedRange gap) {
      missing.add(gap);
      is_there = false;
    });
    count += is_there ? 0 : 1;
  }
  if (count == 0) return 0;
  const Stream stream = driver_.to_device_stream();
  if (moved_away_) driver_.wait(stream, moved_away_);
  for (const PagedRange& range : missing.get()) {
    driver_.move_to_device(range);
    bytes_to_device_ += range.size_bytes;
  }
  brought_ = driver_.record(stream);
  // The ranges, not the padding that was moved along.
  for (const PagedRange& range : ranges) resident_.add(range);
  return count;
}

void ManagedMover::evict(std::span<const PagedRange> ranges, Stream stream) {
  JoinedRanges joined;
  for (const PagedRange& range : ranges) {
    if (range.size_bytes > 0) joined.add(range);
  }
  if (joined.get().empty()) return;
  const Stream mine = driver_.to_host_stream();
  driver_.wait(mine, driver_.record(stream));
  if (brought_) driver_.wait(mine, brought_);
  for (const PagedRange& range : joined.get()) {
    // Also where the pool never brought it to: a kernel may have.
    driver_.move_to_host(range);
    bytes_to_host_ += range.size_bytes;
  }
  moved_away_ = driver_.record(mine);
  for (const PagedRange& range : ranges) resident_.remove(range);
  evictions_ += static_cast<int64_t>(ranges.size());
}

void ManagedMover::plan(std::span<const PagedRange> ranges) { plan_.assign(ranges); }

void ManagedMover::look_ahead(std::span<const PagedRange> acquired) {
  if (plan_.is_over()) return;
  plan_.advance(acquired);
  int64_t bytes = 0;
  for (const PagedRange& range : plan_.ahead()) bytes += range.size_bytes;
  if (bytes >= kLeastAheadBytes) return;
  size_t count = 0;
  for (const PagedRange& range : plan_.beyond()) {
    if (bytes >= kLookAheadBytes) break;
    bytes += range.size_bytes;
    ++count;
  }
  prefetches_ += bring(plan_.beyond().first(count));
  plan_.mark_brought(count);
}

void ManagedMover::show_to_host(PagedRange range, Stream stream) {
  driver_.wait_on_host(driver_.record(stream));
  // The host's accesses fetch the pages.
  resident_.remove(range);
}

PagedEvent ManagedMover::forget(PagedRange range) {
  resident_.remove(range);
  plan_.drop(range);
  if (!brought_ && !moved_away_) return nullptr;
  // One event for both directions.
  const Stream stream = driver_.to_host_stream();
  if (brought_) driver_.wait(stream, brought_);
  return driver_.record(stream);
}

void ManagedMover::add_to(PagedPoolStats* stats) const {
  stats->device_resident_bytes = resident_.size_bytes();
  stats->prefetches = prefetches_;
  stats->evictions = evictions_;
  stats->bytes_to_device = bytes_to_device_;
  stats->bytes_to_host = bytes_to_host_;
}

}  // namespace qlora_native
