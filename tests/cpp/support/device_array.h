// Arrays and queues on the device under test, so that one test body serves every device.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <span>
#include <vector>

#include "qlora_native/qlora_native.h"
#include "support/device_memory.h"

namespace qlora_native::testing {

/// `size` elements of T between two guard zones. Starts full of a poison that is a NaN in every
/// float type, so that an element nobody wrote shows.
template <class T>
class DeviceArray {
 public:
  DeviceArray(Device device, int64_t size) : device_(device), size_(size) {
    const std::vector<uint8_t> poison(static_cast<size_t>(total_bytes()), kPoison);
    base_ =
        static_cast<uint8_t*>(device.is_cuda() ? cuda_allocate(total_bytes())
                                               : std::aligned_alloc(kGuardBytes, aligned_total()));
    if (base_ == nullptr) throw std::bad_alloc();
    copy(base_, poison.data(), total_bytes());
  }
  DeviceArray(Device device, std::span<const T> values)
      : DeviceArray(device, static_cast<int64_t>(values.size())) {
    copy(base_ + kGuardBytes, values.data(), size_ * int64_t{sizeof(T)});
  }
  ~DeviceArray() {
    if (device_.is_cuda()) {
      cuda_free(base_);
    } else {
      std::free(base_);
    }
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() { return static_cast<T*>(static_cast<void*>(base_ + kGuardBytes)); }
  int64_t size() const { return size_; }

  std::vector<T> to_host() const {
    std::vector<T> values(static_cast<size_t>(size_));
    copy(values.data(), base_ + kGuardBytes, size_ * int64_t{sizeof(T)});
    return values;
  }

  /// Nothing was written in front of the array or behind it.
  void expect_guards_intact() const {
    std::vector<uint8_t> bytes(static_cast<size_t>(total_bytes()));
    copy(bytes.data(), base_, total_bytes());
    const auto damaged = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (bytes[static_cast<size_t>(i)] != kPoison) return true;
      }
      return false;
    };
    EXPECT_FALSE(damaged(0, kGuardBytes)) << "written in front of an array of " << size_;
    EXPECT_FALSE(damaged(total_bytes() - kGuardBytes, total_bytes()))
        << "written behind an array of " << size_;
  }

  bool is_untouched() const {
    for (const T& value : to_host()) {
      uint8_t bytes[sizeof(T)];
      std::memcpy(bytes, &value, sizeof(T));
      for (const uint8_t byte : bytes) {
        if (byte != kPoison) return false;
      }
    }
    return true;
  }

 private:
  static constexpr int64_t kGuardBytes = 256;
  static constexpr uint8_t kPoison = 0xff;

  int64_t total_bytes() const { return size_ * int64_t{sizeof(T)} + 2 * kGuardBytes; }
  size_t aligned_total() const {
    return static_cast<size_t>((total_bytes() + kGuardBytes - 1) / kGuardBytes * kGuardBytes);
  }
  void copy(void* to, const void* from, int64_t bytes) const {
    if (bytes == 0) return;
    if (device_.is_cuda()) return cuda_copy(to, from, bytes);
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  Device device_;
  int64_t size_;
  uint8_t* base_ = nullptr;
};

/// A queue of its own on a GPU, so that work which went to another one by accident is not waited
/// for.
class TestStream {
 public:
  explicit TestStream(Device device) : handle_(device.is_cuda() ? cuda_stream_create() : nullptr) {}
  ~TestStream() {
    if (handle_) cuda_stream_destroy(handle_);
  }
  TestStream(const TestStream&) = delete;
  TestStream& operator=(const TestStream&) = delete;

  Stream get() const { return handle_ ? Stream::from_handle(handle_) : Stream::none(); }
  void synchronize() const {
    if (handle_) cuda_stream_synchronize(handle_);
  }

 private:
  void* handle_;
};

}  // namespace qlora_native::testing
