// Paged memory of a GPU: managed and pinned memory, movement on streams of the pool's own.
#include <cuda_runtime_api.h>

#include <new>
#include <optional>
#include <string>
#include <vector>

#include "backend.h"
#include "host/device_info.h"
#include "host/error.h"
#include "host/launch.h"
#include "host/stream.h"
#include "qlora_native/error.h"

namespace qlora_native::cuda {
namespace {

/// Lets the calling thread query events and allocate while some stream is being captured, which the
/// capture would otherwise not survive. Nothing of it goes to a captured stream.
class UncapturedScope {
 public:
  UncapturedScope() { QN_CUDA_TRY(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~UncapturedScope() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  UncapturedScope(const UncapturedScope&) = delete;
  UncapturedScope& operator=(const UncapturedScope&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// A size that the address space cannot hold is an invalid value to some of the runtime's functions.
void check_allocated(cudaError_t status, const char* function, int64_t size_bytes) {
  if (status == cudaSuccess) return;
  const std::string what = std::string(function) + " of " + std::to_string(size_bytes) + " bytes";
  throw_cuda_error(status == cudaErrorInvalidValue ? cudaErrorMemoryAllocation : status, what);
}

cudaMemLocation location_of(int device) {
  cudaMemLocation location{};
  location.type = device == cudaCpuDeviceId ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
  location.id = device == cudaCpuDeviceId ? 0 : device;
  return location;
}

/// CUDA 13 gave two functions of managed memory new parameters under their old names; the type of
/// the function says which there are.
struct ManagedCalls {
  static cudaError_t prefetch(cudaError_t (*function)(const void*, size_t, int, cudaStream_t),
                              PagedRange range, int device, cudaStream_t stream) {
    return function(range.data, static_cast<size_t>(range.size_bytes), device, stream);
  }
  static cudaError_t prefetch(cudaError_t (*function)(const void*, size_t, cudaMemLocation,
                                                      unsigned, cudaStream_t),
                              PagedRange range, int device, cudaStream_t stream) {
    return function(range.data, static_cast<size_t>(range.size_bytes), location_of(device), 0,
                    stream);
  }
  static cudaError_t advise(cudaError_t (*function)(const void*, size_t, cudaMemoryAdvise, int),
                            PagedRange range, cudaMemoryAdvise advice, int device) {
    return function(range.data, static_cast<size_t>(range.size_bytes), advice, device);
  }
  static cudaError_t advise(cudaError_t (*function)(const void*, size_t, cudaMemoryAdvise,
                                                    cudaMemLocation),
                            PagedRange range, cudaMemoryAdvise advice, int device) {
    return function(range.data, static_cast<size_t>(range.size_bytes), advice, location_of(device));
  }
};

class CudaDriver final : public PagedDriver {
 public:
  CudaDriver(Device device, Backing backing) : device_(device.index), backing_(backing) {}
  ~CudaDriver() override {
    // The process may have unloaded the CUDA runtime already: nothing to be done about an error.
    for (const cudaEvent_t event : idle_events_) static_cast<void>(cudaEventDestroy(event));
    for (const auto& stream : {to_device_, to_host_}) {
      if (stream) static_cast<void>(cudaStreamDestroy(*stream));
    }
  }

  Backing backing() const override { return backing_; }

  void* allocate_region(int64_t size_bytes) override {
    const UncapturedScope scope;
    const DeviceGuard guard(device_);
    void* data = nullptr;
    if (backing_ == Backing::kPinned) {
      check_allocated(cudaHostAlloc(&data, static_cast<size_t>(size_bytes), cudaHostAllocPortable),
                      "cudaHostAlloc", size_bytes);
      return data;
    }
    // A gap behind each region, so that movement joined across padding never joins regions.
    const PagedRange region{nullptr, size_bytes + kPagedAlignment};
    check_allocated(cudaMallocManaged(&data, static_cast<size_t>(region.size_bytes)),
                    "cudaMallocManaged", region.size_bytes);
    // Pages that a kernel touches come to it and stay, where there is room.
    const cudaError_t status = ManagedCalls::advise(&cudaMemAdvise, {data, region.size_bytes},
                                                    cudaMemAdviseSetPreferredLocation, device_);
    if (status != cudaSuccess) {
      static_cast<void>(cudaFree(data));
      throw_cuda_error(status, "cudaMemAdvise");
    }
    return data;
  }

  void free_region(void* data, int64_t) noexcept override {
    release(data, backing_ == Backing::kPinned ? cudaFreeHost : cudaFree);
  }

  void* allocate_staging(int64_t size_bytes) override {
    const UncapturedScope scope;
    const DeviceGuard guard(device_);
    void* data = nullptr;
    check_allocated(cudaMalloc(&data, static_cast<size_t>(size_bytes)), "cudaMalloc", size_bytes);
    return data;
  }

  void free_staging(void* data) noexcept override { release(data, cudaFree); }

  Stream to_device_stream() override { return own_stream(to_device_); }
  Stream to_host_stream() override { return own_stream(to_host_); }

  // Default streams, unlike others, are those of the current device: hence the guards.

  bool is_capturing(Stream stream) override {
    const DeviceGuard guard(device_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing(to_cuda(stream), &status);
    if (error == cudaErrorStreamCaptureImplicit) {
      // The legacy default stream, while another one is being captured: it may not be used either.
      static_cast<void>(cudaGetLastError());
      return true;
    }
    check(error, "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }

  PagedEvent record(Stream stream) override {
    const DeviceGuard guard(device_);
    PagedEvent event(take_event(), [this](void* taken) { put_back(taken); });
    QN_CUDA_TRY(cudaEventRecord(static_cast<cudaEvent_t>(event.get()), to_cuda(stream)));
    return event;
  }

  void wait(Stream stream, const PagedEvent& event) override {
    if (!event) return;
    const DeviceGuard guard(device_);
    QN_CUDA_TRY(cudaStreamWaitEvent(to_cuda(stream), static_cast<cudaEvent_t>(event.get()), 0));
  }

  bool is_done(const PagedEvent& event) override {
    if (!event) return true;
    const UncapturedScope scope;
    const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event.get()));
    if (status != cudaSuccess && status != cudaErrorNotReady) {
      throw_cuda_error(status, "cudaEventQuery");
    }
    // "Not ready" is no error, but stays behind as the runtime's last one.
    if (status == cudaErrorNotReady) static_cast<void>(cudaGetLastError());
    return status == cudaSuccess;
  }

  void wait_on_host(const PagedEvent& event) override {
    if (!event) return;
    const UncapturedScope scope;
    QN_CUDA_TRY(cudaEventSynchronize(static_cast<cudaEvent_t>(event.get())));
  }

  void move_to_device(PagedRange range) override {
    QN_CUDA_TRY(
        ManagedCalls::prefetch(&cudaMemPrefetchAsync, range, device_, to_cuda(to_device_stream())));
  }
  void move_to_host(PagedRange range) override {
    QN_CUDA_TRY(ManagedCalls::prefetch(&cudaMemPrefetchAsync, range, cudaCpuDeviceId,
                                       to_cuda(to_host_stream())));
  }
  void copy_to_device(void* staged, const void* host, int64_t size_bytes) override {
    QN_CUDA_TRY(cudaMemcpyAsync(staged, host, static_cast<size_t>(size_bytes),
                                cudaMemcpyHostToDevice, to_cuda(to_device_stream())));
  }
  void copy_to_host(void* host, const void* staged, int64_t size_bytes) override {
    QN_CUDA_TRY(cudaMemcpyAsync(host, staged, static_cast<size_t>(size_bytes),
                                cudaMemcpyDeviceToHost, to_cuda(to_host_stream())));
  }

 private:
  static void release(void* data, cudaError_t (*free)(void*)) noexcept {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode));
    // Fails only when the runtime is unloaded, or has failed for good: the memory goes with it.
    static_cast<void>(free(data));
    static_cast<void>(cudaGetLastError());
    static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode));
  }

  /// Made at its first use: it needs the device's context.
  Stream own_stream(std::optional<cudaStream_t>& stream) {
    if (!stream) {
      const DeviceGuard guard(device_);
      cudaStream_t made = nullptr;
      QN_CUDA_TRY(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
      stream = made;
    }
    return Stream::from_handle(*stream);
  }

  cudaEvent_t take_event() {
    if (!idle_events_.empty()) {
      const cudaEvent_t event = idle_events_.back();
      idle_events_.pop_back();
      return event;
    }
    cudaEvent_t event = nullptr;
    QN_CUDA_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
  }

  void put_back(void* taken) noexcept {
    const auto event = static_cast<cudaEvent_t>(taken);
    try {
      idle_events_.push_back(event);
    } catch (const std::bad_alloc&) {
      static_cast<void>(cudaEventDestroy(event));
    }
  }

  const int device_;
  const Backing backing_;
  std::optional<cudaStream_t> to_device_;
  std::optional<cudaStream_t> to_host_;
  std::vector<cudaEvent_t> idle_events_;
};

bool has_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  QN_CUDA_TRY(cudaDeviceGetAttribute(&value, attribute, device));
  return value != 0;
}

void check_device(Device device) {
  std::string why_not;
  if (!is_usable(device, &why_not)) throw InvalidArgument(to_string(device) + ": " + why_not);
}

BackingChoice choose_backing(Device device) {
  check_device(device);
  if (has_attribute(cudaDevAttrConcurrentManagedAccess, device.index)) {
    return {Backing::kManaged, "the device pages managed memory while it computes"};
  }
  return {Backing::kPinned, "the device cannot page managed memory while it computes"};
}

std::unique_ptr<PagedDriver> make_driver(Device device, Backing backing) {
  check_device(device);
  if (backing == Backing::kHost) {
    throw InvalidArgument("the host backing is for the CPU, not for " + to_string(device));
  }
  if (backing == Backing::kManaged) {
    const BackingChoice choice = choose_backing(device);
    if (choice.backing != Backing::kManaged) {
      throw Unsupported("no managed backing on " + to_string(device) + ": " + choice.reason);
    }
  }
  return std::make_unique<CudaDriver>(device, backing);
}

}  // namespace

const PagedMemoryTable& paged_memory() {
  static constexpr PagedMemoryTable kTable{choose_backing, make_driver};
  return kTable;
}

}  // namespace qlora_native::cuda
