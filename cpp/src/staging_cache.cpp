#include "staging_cache.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "qlora_native/error.h"

namespace qlora_native {
namespace {

std::string text_of(PagedRange range) {
  return std::to_string(range.size_bytes) + " bytes at " +
         std::to_string(reinterpret_cast<uintptr_t>(range.data));
}

char* begin_of(PagedRange range) { return static_cast<char*>(range.data); }
char* end_of(PagedRange range) { return begin_of(range) + range.size_bytes; }

}  // namespace

StagingCache::StagingCache(PagedDriver& driver, int64_t budget_bytes)
    : driver_(driver), arena_bytes_(budget_bytes / kPagedAlignment * kPagedAlignment) {}

StagingCache::~StagingCache() {
  // The driver frees it after the copies that use it.
  if (arena_ != nullptr) driver_.free_staging(arena_);
}

void StagingCache::take_arena() {
  if (arena_ != nullptr) return;
  auto* const arena = static_cast<char*>(driver_.allocate_staging(arena_bytes_));
  try {
    places_.add_region(arena, arena_bytes_);
  } catch (...) {
    driver_.free_staging(arena);
    throw;
  }
  arena_ = arena;
}

StagingCache::Entries::iterator StagingCache::containing(PagedRange range) {
  const auto next = entries_.upper_bound(begin_of(range));
  if (next == entries_.begin()) return entries_.end();
  const auto entry = std::prev(next);
  return end_of(range) <= entry->first + entry->second.size_bytes ? entry : entries_.end();
}

std::vector<StagingCache::Entries::iterator> StagingCache::overlapping(PagedRange range) {
  std::vector<Entries::iterator> found;
  auto entry = entries_.upper_bound(begin_of(range));
  if (entry != entries_.begin()) {
    const auto previous = std::prev(entry);
    if (previous->first + previous->second.size_bytes > begin_of(range)) entry = previous;
  }
  for (; entry != entries_.end() && entry->first < end_of(range); ++entry) found.push_back(entry);
  return found;
}

void StagingCache::erase(Entries::iterator position) {
  Entry& entry = position->second;
  places_.free(entry.place, RegionAllocator::rounded(entry.size_bytes));
  resident_bytes_ -= entry.size_bytes;
  recency_.erase(entry.recency);
  entries_.erase(position);
}

void StagingCache::vacate(std::span<const Entries::iterator> positions, bool is_discarded) {
  if (positions.empty()) return;
  const Stream stream = driver_.to_host_stream();
  for (const auto& position : positions) {
    Entry& entry = position->second;
    if (entry.ready) driver_.wait(stream, entry.ready);
    for (const Use& use : entry.uses) driver_.wait(stream, use.event);
    if (!entry.is_dirty || is_discarded) continue;
    driver_.copy_to_host(position->first, entry.place, entry.size_bytes);
    // Whatever fails from here on, the bytes were sent.
    entry.is_dirty = false;
    bytes_to_host_ += entry.size_bytes;
  }
  vacated_ = driver_.record(stream);
  for (const auto& position : positions) erase(position);
  if (!is_discarded) evictions_ += static_cast<int64_t>(positions.size());
}

char* StagingCache::make_place(int64_t size_bytes, bool spares_wishes) {
  const int64_t rounded = RegionAllocator::rounded(size_bytes);
  const auto victim = [&](bool spares) {
    return std::find_if(recency_.begin(), recency_.end(), [&](char* host) {
      const Entry& entry = entries_.at(host);
      return entry.acquired == 0 && !(spares && entry.wish == wish_);
    });
  };
  for (;;) {
    if (char* const place = places_.allocate(rounded)) return place;
    auto host = victim(true);
    if (host == recency_.end() && !spares_wishes) host = victim(false);
    if (host == recency_.end()) return nullptr;
    const Entries::iterator position = entries_.find(*host);
    vacate({&position, 1});
  }
}

StagingCache::Entries::iterator StagingCache::insert(PagedRange range, bool with_bytes,
                                                     bool spares_wishes) {
  if (range.size_bytes > arena_bytes_) return entries_.end();
  take_arena();
  if (has_stray_copy_) {
    driver_.wait(driver_.to_host_stream(), driver_.record(driver_.to_device_stream()));
    vacated_ = driver_.record(driver_.to_host_stream());
    has_stray_copy_ = false;
  }
  // The order of what follows: whatever throws leaves no entry behind.
  Entries made;
  Entry& entry = made[begin_of(range)];
  std::list<char*> recency{begin_of(range)};
  entry.size_bytes = range.size_bytes;
  entry.place = make_place(range.size_bytes, spares_wishes);
  if (entry.place == nullptr) return entries_.end();
  entry.ready = vacated_;
  if (with_bytes) {
    try {
      const Stream stream = driver_.to_device_stream();
      if (vacated_) driver_.wait(stream, vacated_);
      driver_.copy_to_device(entry.place, range.data, range.size_bytes);
      has_stray_copy_ = true;
      entry.ready = driver_.record(stream);
      has_stray_copy_ = false;
    } catch (...) {
      places_.free(entry.place, RegionAllocator::rounded(range.size_bytes));
      throw;
    }
    entry.is_filled = true;
    bytes_to_device_ += range.size_bytes;
  }
  entry.recency = recency.begin();
  recency_.splice(recency_.end(), recency);
  resident_bytes_ += range.size_bytes;
  return entries_.insert(made.extract(made.begin())).position;
}

void* StagingCache::acquire_one(PagedRange range, Access access, Stream stream) {
  auto position = containing(range);
  if (position == entries_.end()) {
    const std::vector<Entries::iterator> others = overlapping(range);
    for (const auto& other : others) {
      if (other->second.acquired > 0) {
        throw InvalidArgument(
            "acquire: the range of " + text_of(range) + " overlaps the acquired one of " +
            text_of({other->first, other->second.size_bytes}) + " without being part of it");
      }
    }
    vacate(others);
    position = insert(range, access != Access::kWrite, /*spares_wishes=*/false);
    if (position == entries_.end()) {
      throw OutOfMemory("acquire: no room for " + std::to_string(range.size_bytes) +
                        " bytes in the staging cache of " + std::to_string(arena_bytes_) +
                        " bytes beside what is acquired");
    }
  }
  Entry& entry = position->second;
  ++entry.acquired;
  try {
    wait_once(stream, entry.ready);
    for (const Use& use : entry.uses) wait_once(stream, use.event);
  } catch (...) {
    undo_acquire(position);
    throw;
  }
  entry.wish = 0;
  recency_.splice(recency_.end(), recency_, entry.recency);
  return entry.place + (begin_of(range) - position->first);
}

void StagingCache::wait_once(Stream stream, const PagedEvent& event) {
  if (!event || event == waited_for_) return;
  driver_.wait(stream, event);
  waited_for_ = event;
}

void StagingCache::undo_acquire(Entries::iterator position) {
  --position->second.acquired;
  // Nobody has used the place since it was free: it needs no event to be free again.
  if (position->second.acquired == 0 && !position->second.is_filled) erase(position);
}

void StagingCache::acquire(std::span<const PagedRange> ranges, Access access,
                           std::span<void*> addresses, Stream stream) {
  if (driver_.is_capturing(stream)) {
    throw Unsupported(
        "acquire: copies of the pinned backing cannot be captured in a graph; acquire outside of "
        "it, or use the managed backing");
  }
  waited_for_ = nullptr;
  size_t count = 0;
  try {
    for (; count < ranges.size(); ++count) {
      const PagedRange& range = ranges[count];
      addresses[count] = range.size_bytes == 0 ? range.data : acquire_one(range, access, stream);
    }
    if (!plan_.is_over()) {
      plan_.advance(ranges);
      plan_.mark_brought(bring(plan_.beyond()));
    }
  } catch (...) {
    for (size_t i = 0; i < count; ++i) {
      if (ranges[i].size_bytes > 0) undo_acquire(containing(ranges[i]));
    }
    throw;
  }
  if (access == Access::kRead) return;
  for (const PagedRange& range : ranges) {
    if (range.size_bytes > 0) containing(range)->second.is_dirty = true;
  }
}

void StagingCache::release(std::span<const PagedRange> ranges, Stream stream) {
  if (driver_.is_capturing(stream)) {
    // The event would be the graph's: nothing outside of it could wait for the range.
    throw Unsupported(
        "release: pinned paged memory cannot be used in a CUDA graph that is being captured");
  }
  std::vector<Entry*> released;
  try {
    for (const PagedRange& range : ranges) {
      if (range.size_bytes == 0) continue;
      const auto position = containing(range);
      if (position == entries_.end() || position->second.acquired == 0) {
        throw InvalidArgument("release: the range of " + text_of(range) + " is not acquired");
      }
      released.push_back(&position->second);
      --position->second.acquired;
    }
    const PagedEvent event = driver_.record(stream);
    for (Entry* const entry : released) entry->add_use(stream, event);
  } catch (...) {
    for (Entry* const entry : released) ++entry->acquired;
    throw;
  }
}

void StagingCache::Entry::add_use(Stream stream, const PagedEvent& event) {
  const auto use = std::find_if(uses.begin(), uses.end(), [&](const Use& other) {
    return other.stream.handle() == stream.handle();
  });
  if (use == uses.end()) {
    uses.push_back({stream, event});
  } else {
    use->event = event;
  }
  ready = nullptr;
  is_filled = true;
}

size_t StagingCache::bring(std::span<const PagedRange> ranges) {
  size_t count = 0;
  for (; count < ranges.size(); ++count) {
    const PagedRange& range = ranges[count];
    if (range.size_bytes == 0) continue;
    auto position = containing(range);
    if (position == entries_.end()) {
      // A part is there already, with other bounds: left to the acquire, which may have to refuse.
      if (!overlapping(range).empty()) continue;
      position = insert(range, /*with_bytes=*/true, /*spares_wishes=*/true);
      if (position == entries_.end()) break;
      ++prefetches_;
    }
    position->second.wish = wish_;
  }
  return count;
}

void StagingCache::prefetch(std::span<const PagedRange> ranges) {
  ++wish_;
  bring(ranges);
}

void StagingCache::plan(std::span<const PagedRange> ranges) {
  ++wish_;
  plan_.assign(ranges);
  plan_.mark_brought(bring(plan_.beyond()));
}

void StagingCache::evict(std::span<const PagedRange> ranges, Stream stream) {
  driver_.wait(driver_.to_host_stream(), driver_.record(stream));
  for (const PagedRange& range : ranges) {
    std::vector<Entries::iterator> positions = overlapping(range);
    std::erase_if(positions, [](const auto& position) { return position->second.acquired > 0; });
    vacate(positions);
  }
}

void StagingCache::show_to_host(PagedRange range, Stream stream) {
  // The copies end, and none is made ahead: the host may write, which the pool cannot see.
  plan_.drop(range);
  vacate(overlapping(range));
  driver_.wait_on_host(driver_.record(stream));
  if (vacated_) driver_.wait_on_host(vacated_);
}

PagedEvent StagingCache::forget(PagedRange range) {
  plan_.drop(range);
  vacate(overlapping(range), /*is_discarded=*/true);
  return vacated_;
}

void StagingCache::add_to(PagedPoolStats* stats) const {
  stats->device_resident_bytes = resident_bytes_;
  stats->device_reserved_bytes = arena_ == nullptr ? 0 : arena_bytes_;
  stats->prefetches = prefetches_;
  stats->evictions = evictions_;
  stats->bytes_to_device = bytes_to_device_;
  stats->bytes_to_host = bytes_to_host_;
}

}  // namespace qlora_native
