// What paged memory needs of a device: regions, streams of its own, events, movement. Everything
// that decides what moves when is above this and knows no device, so that tests can put a
// simulated one in its place.
#pragma once

#include <cstdint>
#include <memory>

#include "qlora_native/memory.h"
#include "qlora_native/stream.h"

namespace qlora_native {

/// A point in a stream's order: what was queued there when it was recorded. Null: already passed.
using PagedEvent = std::shared_ptr<void>;

/// Of one pool, whose mutex is held during every call; events are destroyed under it too, and
/// before the driver. Functions throw OutOfMemory or CudaError, and then have done nothing.
class PagedDriver {
 public:
  virtual ~PagedDriver() = default;

  virtual Backing backing() const = 0;

  /// Memory for allocations, aligned to kPagedAlignment.
  virtual void* allocate_region(int64_t size_bytes) = 0;
  virtual void free_region(void* data, int64_t size_bytes) noexcept = 0;
  /// Device memory for the staging cache, of the pinned backing alone.
  virtual void* allocate_staging(int64_t size_bytes) = 0;
  virtual void free_staging(void* data) noexcept = 0;

  /// The streams on which the functions below move bytes.
  virtual Stream to_device_stream() = 0;
  virtual Stream to_host_stream() = 0;

  virtual bool is_capturing(Stream stream) = 0;
  virtual PagedEvent record(Stream stream) = 0;
  virtual void wait(Stream stream, const PagedEvent& event) = 0;
  virtual bool is_done(const PagedEvent& event) = 0;
  virtual void wait_on_host(const PagedEvent& event) = 0;

  /// Managed memory: moves pages on the to-device or the to-host stream.
  virtual void move_to_device(PagedRange range) = 0;
  virtual void move_to_host(PagedRange range) = 0;
  /// Pinned memory: copies on the to-device or the to-host stream.
  virtual void copy_to_device(void* staged, const void* host, int64_t size_bytes) = 0;
  virtual void copy_to_host(void* host, const void* staged, int64_t size_bytes) = 0;
};

/// How a backend takes part in paged memory.
struct PagedMemoryTable {
  /// Throws InvalidArgument when there is no such device.
  BackingChoice (*choose_backing)(Device device);
  /// `backing` is not kAuto. Throws as PagedPool's constructor does.
  std::unique_ptr<PagedDriver> (*make_driver)(Device device, Backing backing);
};

}  // namespace qlora_native
