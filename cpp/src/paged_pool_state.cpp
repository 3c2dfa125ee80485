#include "paged_pool_state.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <utility>

#include "qlora_native/error.h"

namespace qlora_native::detail {
namespace {

std::atomic<unsigned> g_forks{0};

/// How many forks lie between this process and the one that loaded the library. Cheaper than asking
/// for the process's id in every call.
unsigned fork_generation() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { g_forks.fetch_add(1, std::memory_order_relaxed); });
  static_cast<void>(registered);
  return g_forks.load(std::memory_order_relaxed);
}

std::string bytes_text(int64_t size_bytes) { return std::to_string(size_bytes) + " bytes"; }

}  // namespace

PagedPoolState::PagedPoolState(const PagedPoolOptions& options, std::unique_ptr<PagedDriver> driver)
    : options_(options),
      process_(fork_generation()),
      driver_(std::move(driver)),
      backing_(driver_->backing()),
      mover_(make_mover(*driver_, options.device_budget_bytes)) {}

PagedPoolState::~PagedPoolState() {
  if (is_foreign_process()) {
    // The parent's memory and streams, of which the child has no use: not its to free.
    static_cast<void>(mover_.release());
    static_cast<void>(driver_.release());
    return;
  }
  mover_.reset();
  pending_.clear();
  for (const auto& region : regions_.regions())
    driver_->free_region(region.begin, region.size_bytes);
}

bool PagedPoolState::is_foreign_process() const noexcept { return fork_generation() != process_; }

std::unique_lock<std::mutex> PagedPoolState::lock(const char* function) const {
  if (is_foreign_process()) {
    throw Error(
        std::string(function) +
        ": this pool of paged memory was made before the process was forked, and belongs to "
        "the parent; make one in the child");
  }
  return std::unique_lock(mutex_);
}

void PagedPoolState::refuse_capture(const char* function, Stream stream) const {
  if (driver_->is_capturing(stream)) {
    throw Unsupported(std::string(function) +
                      ": cannot be captured in a graph; call it before the capture begins");
  }
}

PagedPoolState::Allocation& PagedPoolState::allocation_of(const char* function, PagedRange range) {
  auto* const data = static_cast<char*>(range.data);
  const auto next = allocations_.upper_bound(data);
  if (range.size_bytes >= 0 && next != allocations_.begin()) {
    const auto found = std::prev(next);
    const int64_t offset = data - found->first;
    if (offset <= found->second.size_bytes &&
        range.size_bytes <= found->second.size_bytes - offset) {
      return found->second;
    }
  }
  throw InvalidArgument(std::string(function) + ": the range of " + bytes_text(range.size_bytes) +
                        " at " + std::to_string(reinterpret_cast<uintptr_t>(data)) +
                        " does not lie in one live allocation of the pool");
}

void PagedPoolState::check(const char* function, std::span<const PagedRange> ranges) {
  for (const PagedRange& range : ranges) {
    if (range.size_bytes != 0) allocation_of(function, range);
  }
}

void* PagedPoolState::allocate(int64_t size_bytes, Stream stream) {
  const auto locked = lock("allocate");
  if (size_bytes < 0) {
    throw InvalidArgument("allocate: " + bytes_text(size_bytes) + " are asked for");
  }
  refuse_capture("allocate", stream);
  if (size_bytes == 0) return nullptr;
  try {
    const int64_t rounded = RegionAllocator::rounded(size_bytes);
    char* const data = take(rounded);
    try {
      allocations_.emplace(data, Allocation{size_bytes});
    } catch (...) {
      regions_.free(data, rounded);
      throw;
    }
    used_bytes_ += rounded;
    peak_used_bytes_ = std::max(peak_used_bytes_, used_bytes_);
    return data;
  } catch (const OutOfMemory& error) {
    throw OutOfMemory("allocate: no memory for " + bytes_text(size_bytes) + ": " + error.what() +
                      "; " + describe());
  }
}

char* PagedPoolState::take(int64_t rounded_bytes) {
  collect();
  if (char* const data = regions_.allocate(rounded_bytes)) return data;
  try {
    add_region(rounded_bytes);
  } catch (const OutOfMemory&) {
    if (regions_.empty_regions().empty()) throw;
    return_regions(0);
    add_region(rounded_bytes);
  }
  return regions_.allocate(rounded_bytes);
}

void PagedPoolState::add_region(int64_t rounded_bytes) {
  const int64_t size_bytes =
      std::max(rounded_bytes, RegionAllocator::rounded(options_.region_bytes));
  auto* const begin = static_cast<char*>(driver_->allocate_region(size_bytes));
  try {
    regions_.add_region(begin, size_bytes);
  } catch (...) {
    driver_->free_region(begin, size_bytes);
    throw;
  }
}

void PagedPoolState::deallocate(void* data, Stream stream) {
  if (data == nullptr) return;
  const auto locked = lock("deallocate");
  const auto found = allocations_.find(static_cast<char*>(data));
  if (found == allocations_.end()) {
    throw InvalidArgument("deallocate: the address " +
                          std::to_string(reinterpret_cast<uintptr_t>(data)) +
                          " is not the start of a live allocation of the pool");
  }
  const Allocation& allocation = found->second;
  if (allocation.acquired > 0) {
    throw InvalidArgument("deallocate: the allocation of " + bytes_text(allocation.size_bytes) +
                          " is acquired");
  }
  const int64_t rounded = RegionAllocator::rounded(allocation.size_bytes);
  pending_.reserve(pending_.size() + 1);
  // An event of a capture says nothing of the work outside of it.
  const bool is_recorded = !driver_->is_capturing(stream);
  Pending pending{found->first, rounded, stream, is_recorded, nullptr, nullptr};
  if (is_recorded) pending.used = driver_->record(stream);
  pending.moved = mover_->forget({found->first, allocation.size_bytes});
  pending_.push_back(std::move(pending));
  used_bytes_ -= rounded;
  allocations_.erase(found);
  if (!is_recorded) return;
  collect();
  return_regions(1);
}

void PagedPoolState::deallocate_quietly(void* data, Stream stream) noexcept {
  if (is_foreign_process()) return;
  try {
    deallocate(data, stream);
  } catch (const std::exception&) {
    // A destructor has nobody to tell: the bytes stay taken until the pool ends. So it is when the
    // process ends and the CUDA runtime has gone before.
    return;
  }
}

bool PagedPoolState::is_over(Pending& pending) {
  try {
    if (!pending.is_recorded) {
      if (driver_->is_capturing(pending.stream)) return false;
      pending.used = driver_->record(pending.stream);
      pending.is_recorded = true;
    }
    for (PagedEvent* event : {&pending.used, &pending.moved}) {
      if (*event && !driver_->is_done(*event)) return false;
      *event = nullptr;
    }
    return true;
  } catch (const Error&) {
    // Nobody asked for this memory: whoever asks the device for something next is told.
    return false;
  }
}

/// Makes deallocated memory free whose last use is over.
void PagedPoolState::collect() {
  for (size_t i = 0; i < pending_.size();) {
    if (!is_over(pending_[i])) {
      ++i;
      continue;
    }
    regions_.free(pending_[i].data, pending_[i].size_bytes);
    std::swap(pending_[i], pending_.back());
    pending_.pop_back();
  }
}

void PagedPoolState::return_regions(int kept) {
  const int64_t common_bytes = RegionAllocator::rounded(options_.region_bytes);
  for (const auto& region : regions_.empty_regions()) {
    if (region.size_bytes == common_bytes && kept-- > 0) continue;
    regions_.remove_region(region.begin);
    driver_->free_region(region.begin, region.size_bytes);
  }
}

void PagedPoolState::trim() {
  const auto locked = lock("trim");
  collect();
  return_regions(0);
}

void PagedPoolState::prefetch(std::span<const PagedRange> ranges, Stream stream) {
  const auto locked = lock("prefetch");
  check("prefetch", ranges);
  refuse_capture("prefetch", stream);
  mover_->prefetch(ranges);
}

void PagedPoolState::evict(std::span<const PagedRange> ranges, Stream stream) {
  const auto locked = lock("evict");
  check("evict", ranges);
  refuse_capture("evict", stream);
  mover_->evict(ranges, stream);
}

void PagedPoolState::plan(std::span<const PagedRange> ranges) {
  const auto locked = lock("plan");
  check("plan", ranges);
  mover_->plan(ranges);
}

void PagedPoolState::acquire(std::span<const PagedRange> ranges, Access access,
                             std::span<void*> addresses, Stream stream) {
  const auto locked = lock("acquire");
  if (addresses.size() != ranges.size()) {
    throw InvalidArgument("acquire: room for " + std::to_string(addresses.size()) +
                          " addresses of " + std::to_string(ranges.size()) + " ranges");
  }
  check("acquire", ranges);
  try {
    mover_->acquire(ranges, access, addresses, stream);
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(std::string(error.what()) + "; " + describe());
  }
  for (const PagedRange& range : ranges) {
    if (range.size_bytes != 0) ++allocation_of("acquire", range).acquired;
  }
}

void PagedPoolState::release(std::span<const PagedRange> ranges, Stream stream) {
  const auto locked = lock("release");
  size_t count = 0;
  try {
    for (; count < ranges.size(); ++count) {
      const PagedRange& range = ranges[count];
      if (range.size_bytes == 0) continue;
      Allocation& allocation = allocation_of("release", range);
      if (allocation.acquired == 0) {
        throw InvalidArgument("release: the range of " + bytes_text(range.size_bytes) + " at " +
                              std::to_string(reinterpret_cast<uintptr_t>(range.data)) +
                              " is not acquired");
      }
      --allocation.acquired;
    }
    mover_->release(ranges, stream);
  } catch (...) {
    for (const PagedRange& range : ranges.first(count)) {
      if (range.size_bytes != 0) ++allocation_of("release", range).acquired;
    }
    throw;
  }
}

void* PagedPoolState::host_view(PagedRange range, Stream stream) {
  const auto locked = lock("host_view");
  if (range.size_bytes == 0) return range.data;
  if (allocation_of("host_view", range).acquired > 0) {
    throw InvalidArgument("host_view: of the allocation that holds the range of " +
                          bytes_text(range.size_bytes) + ", something is acquired");
  }
  refuse_capture("host_view", stream);
  mover_->show_to_host(range, stream);
  return range.data;
}

PagedPoolStats PagedPoolState::stats() const {
  const auto locked = lock("stats");
  return count();
}

PagedPoolStats PagedPoolState::count() const {
  PagedPoolStats stats;
  stats.reserved_bytes = regions_.reserved_bytes();
  stats.used_bytes = used_bytes_;
  stats.peak_used_bytes = peak_used_bytes_;
  stats.allocations = static_cast<int64_t>(allocations_.size());
  mover_->add_to(&stats);
  return stats;
}

std::string PagedPoolState::describe() const {
  const PagedPoolStats stats = count();
  int64_t acquired = 0;
  for (const auto& [data, allocation] : allocations_) acquired += allocation.acquired;
  std::string text = "the pool (" + std::string(name(backing_)) + ", " +
                     to_string(options_.device) + ") has " + bytes_text(stats.used_bytes) + " in " +
                     std::to_string(stats.allocations) + " allocations in use of " +
                     bytes_text(stats.reserved_bytes) + " reserved";
  if (backing_ != Backing::kHost) {
    text += ", " + bytes_text(stats.device_resident_bytes) + " on the device, " +
            std::to_string(acquired) + " ranges acquired";
  }
  return text;
}

}  // namespace qlora_native::detail
