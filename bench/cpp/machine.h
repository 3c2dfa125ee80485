// What a benchmark needs of a device besides the library: memory, a clock, and the rate of a copy.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "qlora_native/device.h"
#include "qlora_native/stream.h"

namespace bench {

class Machine {
 public:
  virtual ~Machine() = default;

  virtual qlora_native::Device device() const = 0;
  std::string model() const;     ///< the vendor's name of the device
  std::string features() const;  ///< as the library reports them
  /// Both, and what else the figures depend on.
  virtual std::string name() const = 0;
  virtual qlora_native::Stream stream() const = 0;
  /// Waits for what is queued on `stream()`.
  virtual void synchronize() = 0;

  /// Memory aligned to 256 bytes. Throws std::bad_alloc or qlora_native::OutOfMemory.
  virtual void* allocate(int64_t size_bytes) = 0;
  virtual void release(void* data) = 0;
  virtual void copy_to_device(void* to, const void* from, int64_t size_bytes) = 0;
  virtual void copy_to_host(void* to, const void* from, int64_t size_bytes) = 0;

  /// Work has to touch more memory than this for none of it to be found in a cache; 0 where the
  /// caches are meant to help, as on a CPU, whose last level holds whole layers.
  virtual int64_t cold_bytes() const = 0;

  /// Prepares `calls` to be run again and again; each run of the result returns the seconds of one
  /// pass over all of them. The calls queue work on `stream()` and must outlive the result.
  virtual std::function<double()> replay(const std::vector<std::function<void()>>& calls) = 0;

  /// Bytes read plus written per second by a copy of a large array, measured now, for at least so
  /// long.
  virtual double measure_copy_rate(double min_seconds) = 0;

  // For people: how the copy was made, and how `replay` measures.
  virtual std::string copy_method() const = 0;
  virtual std::string timing_method() const = 0;
};

/// The memory of one array on a machine.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Machine& machine, int64_t size_bytes)
      : machine_(&machine), data_(machine.allocate(size_bytes)), size_bytes_(size_bytes) {}
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) machine_->release(data_);
  }

  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t size_bytes() const { return size_bytes_; }

  /// A host copy of `count` elements.
  template <class T>
  std::vector<T> to_host(int64_t count) const {
    std::vector<T> host(static_cast<size_t>(count));
    if (count > 0)
      machine_->copy_to_host(host.data(), data_, count * static_cast<int64_t>(sizeof(T)));
    return host;
  }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(machine_, other.machine_);
    std::swap(data_, other.data_);
    std::swap(size_bytes_, other.size_bytes_);
  }

  Machine* machine_ = nullptr;
  void* data_ = nullptr;
  int64_t size_bytes_ = 0;
};

/// The median of at least five runs, and of as many as take `min_seconds`, after one that does not
/// count. `run` returns its seconds.
double median_seconds(const std::function<double()>& run, double min_seconds);

std::unique_ptr<Machine> make_cpu_machine();

/// Null when this build or this machine has no CUDA device of that index.
std::unique_ptr<Machine> make_cuda_machine(int index = 0);

}  // namespace bench
