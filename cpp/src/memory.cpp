// PagedPool and PagedBuffer: options checked, everything else is the shared state's.
#include "qlora_native/memory.h"

#include <utility>

#include "backend.h"
#include "paged_pool_state.h"
#include "qlora_native/error.h"

namespace qlora_native {

const char* name(Backing backing) noexcept {
  switch (backing) {
    case Backing::kAuto:
      return "auto";
    case Backing::kManaged:
      return "managed";
    case Backing::kPinned:
      return "pinned";
    case Backing::kHost:
      return "host";
  }
  return "unknown";
}

BackingChoice automatic_backing(Device device) {
  return paged_memory_for(device.type).choose_backing(device);
}

PagedPool::PagedPool(const PagedPoolOptions& options) {
  const auto check = [](const char* what, int64_t size_bytes) {
    if (size_bytes < kPagedAlignment) {
      throw InvalidArgument("PagedPool: " + std::string(what) + " is " +
                            std::to_string(size_bytes) + ", expected at least " +
                            std::to_string(kPagedAlignment));
    }
    RegionAllocator::rounded(size_bytes);
  };
  check("region_bytes", options.region_bytes);
  check("device_budget_bytes", options.device_budget_bytes);
  const Backing backing = options.backing == Backing::kAuto
                              ? automatic_backing(options.device).backing
                              : options.backing;
  state_ = std::make_shared<detail::PagedPoolState>(
      options, paged_memory_for(options.device.type).make_driver(options.device, backing));
}

Device PagedPool::device() const noexcept { return state_->device(); }
Backing PagedPool::backing() const noexcept { return state_->backing(); }

void* PagedPool::allocate(int64_t size_bytes, Stream stream) {
  return state_->allocate(size_bytes, stream);
}

void PagedPool::deallocate(void* data, Stream stream) { state_->deallocate(data, stream); }

void PagedPool::prefetch(std::span<const PagedRange> ranges, Stream stream) {
  state_->prefetch(ranges, stream);
}

void PagedPool::evict(std::span<const PagedRange> ranges, Stream stream) {
  state_->evict(ranges, stream);
}

void PagedPool::plan(std::span<const PagedRange> ranges) { state_->plan(ranges); }

void PagedPool::acquire(std::span<const PagedRange> ranges, Access access,
                        std::span<void*> addresses, Stream stream) {
  state_->acquire(ranges, access, addresses, stream);
}

void* PagedPool::acquire(PagedRange range, Access access, Stream stream) {
  void* address = nullptr;
  state_->acquire({&range, 1}, access, {&address, 1}, stream);
  return address;
}

void PagedPool::release(std::span<const PagedRange> ranges, Stream stream) {
  state_->release(ranges, stream);
}

void PagedPool::release(PagedRange range, Stream stream) { state_->release({&range, 1}, stream); }

void* PagedPool::host_view(PagedRange range, Stream stream) {
  return state_->host_view(range, stream);
}

void PagedPool::trim() { state_->trim(); }

PagedPoolStats PagedPool::stats() const { return state_->stats(); }

int64_t PagedPool::resident_bytes(Device device) const {
  const PagedPoolStats counted = stats();
  if (device == state_->device() && device.is_cuda()) return counted.device_resident_bytes;
  return device.is_cpu() ? counted.used_bytes - counted.device_resident_bytes : 0;
}

PagedBuffer::PagedBuffer(const PagedPool& pool, int64_t size_bytes, Stream stream)
    : state_(pool.state_),
      range_{state_->allocate(size_bytes, stream), size_bytes},
      stream_(stream) {}

PagedBuffer::PagedBuffer(PagedBuffer&& other) noexcept
    : state_(std::move(other.state_)),
      range_(std::exchange(other.range_, {})),
      stream_(other.stream_) {}

PagedBuffer& PagedBuffer::operator=(PagedBuffer&& other) noexcept {
  PagedBuffer taken(std::move(other));
  std::swap(state_, taken.state_);
  std::swap(range_, taken.range_);
  std::swap(stream_, taken.stream_);
  return *this;
}

PagedBuffer::~PagedBuffer() {
  if (range_.data != nullptr) state_->deallocate_quietly(range_.data, stream_);
}

}  // namespace qlora_native
