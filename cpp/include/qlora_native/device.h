// Devices: where an array lives and where an operation runs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "qlora_native/export.h"

namespace qlora_native {

enum class DeviceType : int32_t { kCpu = 0, kCuda = 1 };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int32_t index = 0;

  static constexpr Device cpu() { return {}; }
  static constexpr Device cuda(int32_t index) { return {DeviceType::kCuda, index}; }
  constexpr bool is_cpu() const { return type == DeviceType::kCpu; }
  constexpr bool is_cuda() const { return type == DeviceType::kCuda; }
  friend constexpr bool operator==(Device, Device) = default;
};

constexpr const char* name(DeviceType type) { return type == DeviceType::kCpu ? "cpu" : "cuda"; }

/// "cpu" or "cuda:0".
QN_API std::string to_string(Device device);

struct DeviceInfo {
  Device device;
  std::string name;          ///< the vendor's name of the processor
  std::string features;      ///< instruction sets of a CPU; "sm_90, 132 SMs" of a GPU
  int64_t memory_bytes = 0;  ///< total memory
};

/// Every device this build can use: the CPU first, then CUDA devices. Never throws: a missing
/// driver means no CUDA device, and `cuda_unavailable_reason()` says why.
QN_API std::vector<DeviceInfo> list_devices();

/// Why there is no CUDA device ("built without CUDA", the driver's message, ...), or "" if there is
/// one.
QN_API std::string cuda_unavailable_reason();

/// Number of threads that operations on the CPU use, the caller's included. Process-wide;
/// thread-safe. Starts as the number of hardware threads this process may run on.
QN_API int cpu_threads() noexcept;

/// Sets `cpu_threads()`. Throws InvalidArgument when `threads` < 1.
QN_API void set_cpu_threads(int threads);

/// Runs `body(context)` on up to `threads` threads at once, the caller's among them, and returns
/// when every run is over. Fewer runs than asked for are fine, one too. `body` does not throw.
using CpuExecutor = void (*)(int threads, void (*body)(void* context), void* context);

/// From now on operations on the CPU run on the threads of `executor` (null: the library's own).
/// For programs that have a thread pool already: two pools whose idle threads spin, as OpenMP's do,
/// take the cores from each other. A forked child starts without one.
QN_API void set_cpu_executor(CpuExecutor executor) noexcept;

}  // namespace qlora_native
