// Paged memory as a program uses it, on every device with every backing it has.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "qlora_native/memory.h"
#include "support/device_array.h"

namespace qlora_native::testing {
namespace {

constexpr int64_t kRegionBytes = 1 << 20;
constexpr int64_t kBudgetBytes = 1 << 20;

struct Case {
  Device device;
  Backing backing;
};

std::vector<Case> cases() {
  std::vector<Case> all = {{Device::cpu(), Backing::kHost}};
  for (const DeviceInfo& info : list_devices()) {
    if (!info.device.is_cuda()) continue;
    all.push_back({info.device, Backing::kPinned});
    if (automatic_backing(info.device).backing == Backing::kManaged) {
      all.push_back({info.device, Backing::kManaged});
    }
  }
  return all;
}

class Memory : public ::testing::TestWithParam<Case> {
 protected:
  PagedPool make_pool() {
    return PagedPool({.device = GetParam().device,
                      .backing = GetParam().backing,
                      .region_bytes = kRegionBytes,
                      .device_budget_bytes = kBudgetBytes});
  }

  /// Bytes written and read where a device works on them.
  void write(void* to, const std::vector<uint8_t>& bytes) {
    if (GetParam().device.is_cuda())
      return cuda_copy(to, bytes.data(), static_cast<int64_t>(bytes.size()));
    std::memcpy(to, bytes.data(), bytes.size());
  }
  std::vector<uint8_t> read(const void* from, int64_t size_bytes) {
    std::vector<uint8_t> bytes(static_cast<size_t>(size_bytes));
    if (GetParam().device.is_cuda()) {
      cuda_copy(bytes.data(), from, size_bytes);
    } else {
      std::memcpy(bytes.data(), from, bytes.size());
    }
    return bytes;
  }
  static std::vector<uint8_t> pattern(int64_t size_bytes, int seed) {
    std::vector<uint8_t> bytes(static_cast<size_t>(size_bytes));
    for (size_t i = 0; i < bytes.size(); ++i)
      bytes[i] = static_cast<uint8_t>(i * 31 + i / 251 + static_cast<size_t>(seed));
    return bytes;
  }

  TestStream stream_{GetParam().device};
};

TEST_P(Memory, BytesSurviveAnyMovement) {
  PagedPool pool = make_pool();
  EXPECT_EQ(pool.backing(), GetParam().backing);
  EXPECT_EQ(pool.device(), GetParam().device);
  const Stream stream = stream_.get();
  // Four times the budget, in ranges that it holds eight of.
  constexpr int64_t kBytes = kBudgetBytes / 8;
  std::vector<PagedBuffer> buffers;
  std::vector<PagedRange> ranges;
  for (int i = 0; i < 32; ++i) {
    buffers.emplace_back(pool, kBytes, stream);
    ranges.push_back(buffers.back().range());
    const std::vector<uint8_t> bytes = pattern(kBytes, i);
    std::memcpy(ranges.back().data, bytes.data(), bytes.size());
  }
  for (int pass = 0; pass < 3; ++pass) {
    pool.plan(ranges);
    for (int i = 0; i < 32; ++i) {
      const PagedRange range = ranges[static_cast<size_t>(i)];
      void* const address = pool.acquire(range, Access::kReadWrite, stream);
      stream_.synchronize();
      EXPECT_EQ(read(address, kBytes), pattern(kBytes, i + pass)) << "pass " << pass << ", " << i;
      write(address, pattern(kBytes, i + pass + 1));
      pool.release(range, stream);
      if (pass == 1 && i % 5 == 0) pool.evict({&range, 1}, stream);
      if (pass == 2 && i % 7 == 0) pool.prefetch(ranges, stream);
    }
  }
  for (int i = 0; i < 32; ++i) {
    const void* const seen = pool.host_view(ranges[static_cast<size_t>(i)], stream);
    EXPECT_EQ(seen, ranges[static_cast<size_t>(i)].data);
    const std::vector<uint8_t> expected = pattern(kBytes, i + 3);
    EXPECT_EQ(std::memcmp(seen, expected.data(), expected.size()), 0) << i;
  }
  const PagedPoolStats stats = pool.stats();
  EXPECT_EQ(stats.allocations, 32);
  EXPECT_EQ(stats.used_bytes, 32 * kBytes);
  if (GetParam().device.is_cuda()) {
    EXPECT_GT(stats.prefetches, 0);
    EXPECT_GT(stats.evictions, 0);
    EXPECT_GE(stats.bytes_to_device, 32 * kBytes);
    EXPECT_GT(stats.bytes_to_host, 0);
  } else {
    EXPECT_EQ(pool.resident_bytes(Device::cpu()), 32 * kBytes);
    EXPECT_EQ(stats.bytes_to_device, 0);
  }
  if (GetParam().backing == Backing::kPinned) {
    EXPECT_EQ(stats.device_reserved_bytes, kBudgetBytes);
    EXPECT_LE(pool.resident_bytes(GetParam().device), kBudgetBytes);
  }
}

TEST_P(Memory, BuffersReturnWhatTheyTook) {
  PagedPool pool = make_pool();
  for (int cycle = 0; cycle < 10000; ++cycle) {
    PagedBuffer a(pool, 1 + cycle % 5000, stream_.get());
    PagedBuffer b = std::move(a);
    EXPECT_EQ(a.data(), nullptr);
    ASSERT_NE(b.data(), nullptr);
    static_cast<uint8_t*>(b.data())[cycle % 5000] = 1;
  }
  const PagedPoolStats stats = pool.stats();
  EXPECT_EQ(stats.used_bytes, 0);
  EXPECT_EQ(stats.allocations, 0);
  EXPECT_LE(stats.reserved_bytes, kRegionBytes);
  stream_.synchronize();
  pool.trim();
  EXPECT_EQ(pool.stats().reserved_bytes, 0);
}

TEST_P(Memory, ABufferOutlivesItsPool) {
  PagedBuffer buffer;
  {
    const PagedPool pool = make_pool();
    buffer = PagedBuffer(pool, 1000, stream_.get());
  }
  std::memset(buffer.data(), 7, 1000);
  EXPECT_EQ(static_cast<uint8_t*>(buffer.data())[999], 7);
  buffer = PagedBuffer();
}

TEST_P(Memory, NothingIsNothing) {
  PagedPool pool = make_pool();
  EXPECT_EQ(pool.allocate(0, stream_.get()), nullptr);
  pool.deallocate(nullptr, stream_.get());
  const PagedRange nothing{};
  EXPECT_EQ(pool.acquire(nothing, Access::kReadWrite, stream_.get()), nullptr);
  pool.release(nothing, stream_.get());
  pool.prefetch({}, stream_.get());
  pool.evict({}, stream_.get());
  EXPECT_EQ(pool.host_view(nothing, stream_.get()), nullptr);
  EXPECT_EQ(pool.stats().reserved_bytes, 0);
}

TEST_P(Memory, WhatCannotBeAllocatedIsSaidAndChangesNothing) {
  PagedPool pool = make_pool();
  void* const data = pool.allocate(1000, stream_.get());
  for (const int64_t size_bytes : {std::numeric_limits<int64_t>::max(), int64_t{1} << 60}) {
    try {
      pool.allocate(size_bytes, stream_.get());
      FAIL() << size_bytes;
    } catch (const OutOfMemory& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find(std::to_string(size_bytes)), std::string::npos) << message;
      EXPECT_NE(message.find("1024 bytes in 1 allocations"), std::string::npos) << message;
    }
  }
  EXPECT_THROW(pool.allocate(-1, stream_.get()), InvalidArgument);
  EXPECT_EQ(pool.stats().used_bytes, 1024);
  pool.deallocate(data, stream_.get());
  EXPECT_THROW(pool.deallocate(data, stream_.get()), InvalidArgument);
}

TEST_P(Memory, SeveralThreadsAndPools) {
  PagedPool shared = make_pool();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      PagedPool own = make_pool();
      const TestStream stream(GetParam().device);
      for (int round = 0; round < 200; ++round) {
        PagedPool& pool = round % 2 ? shared : own;
        const PagedBuffer buffer(pool, 100 + 13 * t + round, stream.get());
        std::memset(buffer.data(), t, 100);
        const PagedRange range = buffer.range();
        pool.prefetch({&range, 1}, stream.get());
        void* const address = pool.acquire(range, Access::kRead, stream.get());
        EXPECT_NE(address, nullptr);
        pool.release(range, stream.get());
        pool.evict({&range, 1}, stream.get());
        EXPECT_EQ(static_cast<uint8_t*>(pool.host_view(range, stream.get()))[99], t);
        EXPECT_GE(shared.stats().used_bytes, 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(shared.stats().used_bytes, 0);
}

TEST_P(Memory, AForkedChildIsRefused) {
  PagedPool pool = make_pool();
  auto buffer = std::make_unique<PagedBuffer>(pool, 100, stream_.get());
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);
    int problems = 0;
    try {
      pool.allocate(1, stream_.get());
      problems |= 1;
    } catch (const Error& error) {
      problems |= std::string(error.what()).find("forked") == std::string::npos ? 2 : 0;
    }
    buffer.reset();  // Its death is none of the parent's memory.
    pool = GetParam().device.is_cpu() ? PagedPool({.device = Device::cpu()}) : pool;
    if (GetParam().device.is_cpu()) {
      problems |= PagedBuffer(pool, 100, Stream::none()).data() == nullptr ? 4 : 0;
    }
    _exit(problems);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  std::memset(buffer->data(), 1, 100);
  EXPECT_EQ(pool.stats().allocations, 1);
}

INSTANTIATE_TEST_SUITE_P(Backings, Memory, ::testing::ValuesIn(cases()), [](const auto& info) {
  const Device device = info.param.device;
  return std::string(name(info.param.backing)) +
         (device.is_cuda() ? std::to_string(device.index) : "");
});

TEST(MemoryOptions, AreChecked) {
  EXPECT_THROW(PagedPool({.device = Device::cpu(), .region_bytes = 0}), InvalidArgument);
  EXPECT_THROW(PagedPool({.device = Device::cpu(), .device_budget_bytes = 255}), InvalidArgument);
  EXPECT_THROW(PagedPool({.device = {DeviceType::kCpu, 1}}), InvalidArgument);
  EXPECT_THROW(PagedPool({.device = Device::cuda(100)}), InvalidArgument);
  EXPECT_THROW(automatic_backing(Device::cuda(100)), InvalidArgument);
  EXPECT_EQ(PagedPool({.device = Device::cpu(), .backing = Backing::kPinned}).backing(),
            Backing::kHost);
  EXPECT_FALSE(automatic_backing(Device::cpu()).reason.empty());
}

}  // namespace
}  // namespace qlora_native::testing
