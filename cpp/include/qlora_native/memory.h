// Paged memory: for state that is large and rarely touched, such as an optimizer's. It lies where
// there is room, and comes to the device when it is needed.
//
// A PagedPool makes many small allocations out of a few large regions. What moves them is its
// backing:
//   managed  unified memory. Host and device share one address; the pool moves pages in bulk, and
//            the driver moves whatever nobody asked for: it makes room for other allocations, and
//            brings pages back when they are touched.
//   pinned   pinned host memory. The device sees copies in a staging cache of a fixed size, the
//            least recently used going first: a hard bound on device memory.
//   host     the CPU's memory, for a pool of the CPU: nothing moves.
//
// The order of things. All movement is asynchronous, on two streams of the pool's own, one for each
// direction, and ordered by events; nothing waits for the device. The exceptions are named:
// `host_view` waits for the newest bytes, and giving a region back (`trim`, or the end of the last
// allocation in it) frees it in the CUDA runtime, which may wait.
//
// Work on a device uses paged memory between `acquire` and `release`, which name its stream. With
// the managed backing a kernel may touch it outside of them too, at the price of page faults.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "qlora_native/device.h"
#include "qlora_native/export.h"
#include "qlora_native/stream.h"

namespace qlora_native {

namespace detail {
class PagedPoolState;
}

enum class Backing : int32_t {
  kAuto = 0,  ///< kManaged where the device can page while it computes, else kPinned
  kManaged = 1,
  kPinned = 2,
  kHost = 3,  ///< what a pool of the CPU has, whichever was asked for
};

/// "auto", "managed", "pinned", "host".
QN_API const char* name(Backing backing) noexcept;

/// What kAuto stands for on a device.
struct BackingChoice {
  Backing backing;
  std::string reason;  ///< a phrase for people
};

/// Throws InvalidArgument when there is no such device.
QN_API BackingChoice automatic_backing(Device device);

/// What work does with the bytes that it acquires.
enum class Access : int32_t {
  kRead = 0,
  kWrite = 1,  ///< writes all of them, and reads none that it has not written
  kReadWrite = 2,
};

/// Bytes of one allocation, by the address that the pool gave out (`data` may lie inside of it).
struct PagedRange {
  void* data = nullptr;
  int64_t size_bytes = 0;
  friend bool operator==(const PagedRange&, const PagedRange&) = default;
};

inline constexpr int64_t kPagedAlignment = 256;  ///< bytes, of every allocation and staged copy

struct PagedPoolOptions {
  Device device;
  Backing backing = Backing::kAuto;
  /// Allocations share regions of this size; a larger one has a region of its own.
  int64_t region_bytes = int64_t{64} << 20;
  /// Device memory of the staging cache of the pinned backing; taken at the first `acquire` or
  /// `prefetch`, and as a whole. Copies overlap work in both directions when the ranges of a plan
  /// are an eighth of it or less.
  int64_t device_budget_bytes = int64_t{256} << 20;
};

struct PagedPoolStats {
  int64_t reserved_bytes = 0;   ///< of all regions
  int64_t used_bytes = 0;       ///< of live allocations, each rounded up to kPagedAlignment
  int64_t peak_used_bytes = 0;  ///< the most that `used_bytes` has been
  int64_t allocations = 0;      ///< live ones
  /// Of allocated bytes, those that the pool has brought to the device and not moved away since.
  /// What the driver moves on its own account (managed) is not known here.
  int64_t device_resident_bytes = 0;
  int64_t device_reserved_bytes = 0;  ///< device memory of the staging cache
  int64_t prefetches = 0;             ///< ranges brought to the device ahead of their `acquire`
  int64_t evictions = 0;              ///< ranges moved off the device
  int64_t bytes_to_device = 0;        ///< moved so far
  int64_t bytes_to_host = 0;
};

/// A handle to a pool; copies are handles to the same one. Regions are returned when the last handle
/// and the last PagedBuffer are gone. Every function may be called from several threads at once; a
/// range is used by one of them at a time.
///
/// Every function throws InvalidArgument for a range that does not lie in one live allocation, and
/// Error in a child that was forked after the pool was made: a pool belongs to its process. (In
/// such a child, what dies is left alone.)
class QN_API PagedPool {
 public:
  /// Takes no memory yet. Throws InvalidArgument when an option is out of range or there is no such
  /// device, Unsupported when the device does not have the backing.
  explicit PagedPool(const PagedPoolOptions& options);

  Device device() const noexcept;
  Backing backing() const noexcept;  ///< never kAuto

  /// `size_bytes` uninitialized bytes, aligned to kPagedAlignment; null for 0. `stream` is where
  /// they are used first. Throws InvalidArgument for a negative size, OutOfMemory, with the size
  /// and the pool's state, when there is no memory (the pool is as before), and Unsupported while
  /// `stream` is being captured in a graph.
  void* allocate(int64_t size_bytes, Stream stream);

  /// Takes `data` back, which may be null. Its bytes are handed out again, or returned, when what is
  /// queued on `stream` now, and the pool's own movement of them, is done. Throws InvalidArgument
  /// when `data` is not the start of a live allocation, or parts of it are acquired.
  void deallocate(void* data, Stream stream);

  /// Begins to bring ranges to the device, beside what is queued on `stream`, whose later work finds
  /// them there when it has acquired them. The pinned backing brings as many as fit beside what is
  /// acquired, in the order given. Throws Unsupported while `stream` is being captured.
  void prefetch(std::span<const PagedRange> ranges, Stream stream);

  /// Moves ranges off the device after what is queued on `stream` now. Ranges that are acquired
  /// stay. Throws Unsupported while `stream` is being captured.
  void evict(std::span<const PagedRange> ranges, Stream stream);

  /// The order in which `ranges` are going to be acquired, once; replaces an earlier plan. From now
  /// on each `acquire` of the next ones begins to bring those that follow, as far as there is room;
  /// the pinned backing begins at once.
  void plan(std::span<const PagedRange> ranges);

  /// Where work that is queued on `stream` after the call finds the bytes of each range, and leaves
  /// them, until `release`: `addresses[i]` on the device for `ranges[i]`. All of them or none.
  /// Ranges of 0 bytes get their own address.
  /// Managed memory: the range's own address; can be captured in a graph (then nothing is moved).
  /// Pinned: a staged copy. Throws OutOfMemory, with the size and the pool's state, when there is no
  /// room beside what is acquired, InvalidArgument for a range that overlaps an acquired one without
  /// being part of it, and Unsupported while `stream` is being captured.
  void acquire(std::span<const PagedRange> ranges, Access access, std::span<void*> addresses,
               Stream stream);
  void* acquire(PagedRange range, Access access, Stream stream);

  /// Ends one `acquire` of each range, for work queued on `stream` after the call: all of them or
  /// none. Throws InvalidArgument when a range is not acquired (which backings without copies know
  /// of whole allocations only), and of pinned memory Unsupported while `stream` is being captured.
  void release(std::span<const PagedRange> ranges, Stream stream);
  void release(PagedRange range, Stream stream);

  /// Makes the range's own address show the newest bytes to the host, and returns it: waits for what
  /// is queued on `stream` and for the pool's movement of the range. The host may read and write there
  /// until the range is next acquired, prefetched or planned; fresh memory needs no host_view.
  /// Throws InvalidArgument while the range is acquired, and Unsupported while `stream` is being
  /// captured.
  void* host_view(PagedRange range, Stream stream);

  /// Gives back regions without allocations. One of them is otherwise kept for reuse.
  void trim();

  PagedPoolStats stats() const;

  /// Allocated bytes that are on `device`, as far as the pool knows (PagedPoolStats); those of the
  /// CPU are the ones not on the pool's device. 0 for other devices.
  int64_t resident_bytes(Device device) const;

 private:
  friend class PagedBuffer;
  std::shared_ptr<detail::PagedPoolState> state_;
};

/// One allocation; keeps the pool's memory alive, and gives its own back in the end.
class QN_API PagedBuffer {
 public:
  PagedBuffer() = default;
  /// As PagedPool::allocate. The memory may be used on `stream` without being acquired; a
  /// `stream` that is not null outlives the buffer.
  PagedBuffer(const PagedPool& pool, int64_t size_bytes, Stream stream);
  PagedBuffer(PagedBuffer&& other) noexcept;
  PagedBuffer& operator=(PagedBuffer&& other) noexcept;
  ~PagedBuffer();

  void* data() const noexcept { return range_.data; }
  int64_t size_bytes() const noexcept { return range_.size_bytes; }
  PagedRange range() const noexcept { return range_; }

 private:
  std::shared_ptr<detail::PagedPoolState> state_;
  PagedRange range_;
  Stream stream_ = Stream::none();
};

}  // namespace qlora_native
