// Kernel launches: on a given device and stream, every one checked.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "host/error.h"
#include "qlora_native/error.h"

namespace qlora_native::cuda {

/// Makes a device current for the calling thread; puts the previous one back at the end of the
/// scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    QN_CUDA_TRY(cudaGetDevice(&previous_));
    changed_ = previous_ != device;
    if (changed_) QN_CUDA_TRY(cudaSetDevice(device));
  }
  ~DeviceGuard() {
    // A destructor cannot throw; a device that was current a moment ago can be current again.
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

/// A one-dimensional launch. `grid` is 64-bit so that a caller's block count is checked, not cut
/// off.
struct LaunchShape {
  int64_t grid;
  int block;
  size_t dynamic_shared_bytes = 0;
  int cluster = 1;  ///< thread blocks that share their memory; more than 1 needs sm_90
  /// The kernel may start while the previous one of the stream ends, or all that this one waits for
  /// (`allow_next_kernel`): it calls wait_for_previous_kernel() itself, in any case. Only where is_compiled_for_hopper(): elsewhere that is
  /// empty.
  bool overlaps_previous = false;
};

/// Calls something once for each device; again when it threw. A static of the caller.
class OncePerDevice {
 public:
  /// Calls `function` unless it was called for `device`.
  template <class Function>
  void operator()(int device, const Function& function) {
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if ((done_.load(std::memory_order_acquire) & bit) != 0) return;
    function();
    done_.fetch_or(bit, std::memory_order_release);
  }

 private:
  std::atomic<uint64_t> done_ = 0;
};

/// Lets `kernel` have more than 48 KB of dynamic shared memory on the current device.
template <class... Params>
void allow_shared_memory(void (*kernel)(Params...), int64_t bytes) {
  QN_CUDA_TRY(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)));
}

/// Queues `kernel` on `stream` of the current device. The status checked is the launch call's own:
/// it cannot be mistaken for an older error that another library left behind in the runtime.
/// Throws Unsupported when the grid is larger than CUDA allows, CudaError when the launch fails.
template <class... Params>
void launch(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
            cudaStream_t stream, std::type_identity_t<Params>... args) {
  if (shape.grid > std::numeric_limits<int32_t>::max()) {
    throw Unsupported(std::string(name) + ": needs a grid of " + std::to_string(shape.grid) +
                      " thread blocks, CUDA allows " +
                      std::to_string(std::numeric_limits<int32_t>::max()));
  }
  void* pointers[] = {static_cast<void*>(&args)...};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid));
  config.blockDim = dim3(static_cast<unsigned>(shape.block));
  config.dynamicSmemBytes = shape.dynamic_shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.overlaps_previous) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t status =
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
  if (status != cudaSuccess) {
    throw_cuda_error(status, std::string("the launch of ") + name + " (grid " +
                                 std::to_string(shape.grid) + ", block " +
                                 std::to_string(shape.block) + ", " +
                                 std::to_string(shape.dynamic_shared_bytes) +
                                 " bytes of dynamic shared memory)");
  }
}

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace qlora_native::cuda
