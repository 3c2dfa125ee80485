// Random programs over paged memory on a simulated device, compared with plain arrays: whatever
// moves when, work and host find the bytes that were written last.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "paged_pool_state.h"
#include "qlora_native/error.h"
#include "support/simulated_driver.h"

namespace qlora_native::testing {
namespace {

constexpr int64_t kRegionBytes = 16 << 10;
constexpr int64_t kBudgetBytes = 8 << 10;
constexpr int64_t kMaxBytes = 3000;

/// A pool, what its bytes should be, and random operations on both.
class Program {
 public:
  Program(Backing backing, uint64_t seed, bool has_failures)
      : has_failures_(has_failures), random_(seed) {
    auto driver = std::make_unique<SimulatedDriver>(backing, seed);
    driver_ = driver.get();
    const PagedPoolOptions options{.device = Device::cuda(0),
                                   .backing = backing,
                                   .region_bytes = kRegionBytes,
                                   .device_budget_bytes = kBudgetBytes};
    pool_ = std::make_unique<detail::PagedPoolState>(options, std::move(driver));
  }

  void run(int operations) {
    for (int i = 0; i < operations; ++i) {
      if (has_failures_ && pick(4) == 0) driver_->fail_after(1 + pick(6));
      try {
        operation();
      } catch (const CudaError&) {
        ++failures_;
      }
      driver_->fail_after(0);
      driver_->run(pick(8));
    }
  }

  void finish() {
    while (!acquired_.empty()) release(0);
    driver_->drain();
    for (const auto& array : arrays_) expect_on_host(*array);
    for (const auto& array : arrays_) pool_->deallocate(array->data, stream());
    driver_->drain();
    pool_->trim();
    const PagedPoolStats stats = pool_->stats();
    EXPECT_EQ(stats.used_bytes, 0);
    EXPECT_EQ(stats.allocations, 0);
    EXPECT_EQ(stats.device_resident_bytes, 0);
    EXPECT_EQ(stats.reserved_bytes, 0);
    EXPECT_EQ(driver_->regions(), 0);
    EXPECT_EQ(wrong_, 0) << "work found other bytes than were written last";
  }

  int failures() const { return failures_; }
  PagedPoolStats stats() const { return pool_->stats(); }

 private:
  struct Array {
    char* data;
    std::vector<char> expected;
    int acquired = 0;
  };
  struct Acquired {
    PagedRange range;
    Stream stream;
    Array* array;
  };

  int pick(int count) { return static_cast<int>(random_() % static_cast<uint64_t>(count)); }
  Stream stream() { return Stream::from_handle(&streams_[pick(2)]); }
  char byte() { return static_cast<char>(random_()); }

  void operation() {
    switch (pick(12)) {
      case 0:
        return allocate();
      case 1:
        return deallocate();
      case 2:
        return pool_->prefetch(some_ranges(), stream());
      case 3:
        return pool_->evict(some_ranges(), stream());
      case 4:
        return pool_->plan(some_ranges());
      case 5:
        return host_writes();
      case 6:
      case 7:
        if (!acquired_.empty())
          release(static_cast<size_t>(pick(static_cast<int>(acquired_.size()))));
        return;
      default:
        return acquire();
    }
  }

  void allocate() {
    if (arrays_.size() > 12) return;
    const int64_t size_bytes = 1 + pick(kMaxBytes);
    auto* const data = static_cast<char*>(pool_->allocate(size_bytes, stream()));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % kPagedAlignment, 0u);
    auto array = std::make_unique<Array>(Array{data, std::vector<char>(size_bytes)});
    for (char& value : array->expected) value = byte();
    // Fresh memory is the caller's at once.
    std::memcpy(data, array->expected.data(), array->expected.size());
    arrays_.push_back(std::move(array));
  }

  Array* idle_array() {
    if (arrays_.empty()) return nullptr;
    Array* const array = arrays_[static_cast<size_t>(pick(static_cast<int>(arrays_.size())))].get();
    return array->acquired == 0 ? array : nullptr;
  }

  void deallocate() {
    Array* const array = idle_array();
    if (array == nullptr) return;
    pool_->deallocate(array->data, stream());
    std::erase_if(arrays_, [&](const auto& other) { return other.get() == array; });
  }

  /// The whole of an array, a half of it, or any part.
  PagedRange range_in(const Array& array) {
    const auto size_bytes = static_cast<int64_t>(array.expected.size());
    switch (pick(4)) {
      case 0: {
        const int64_t begin = pick(static_cast<int>(size_bytes));
        return {array.data + begin, pick(static_cast<int>(size_bytes - begin) + 1)};
      }
      case 1: {
        const int64_t half = size_bytes / 2;
        return pick(2) ? PagedRange{array.data, half}
                       : PagedRange{array.data + half, size_bytes - half};
      }
      default:
        return {array.data, size_bytes};
    }
  }

  std::vector<PagedRange> some_ranges() {
    std::vector<PagedRange> ranges;
    for (const auto& array : arrays_) {
      if (pick(2)) ranges.push_back(range_in(*array));
    }
    std::shuffle(ranges.begin(), ranges.end(), random_);
    return ranges;
  }

  void acquire() {
    Array* const array = idle_array();
    if (array == nullptr) return;
    const PagedRange range = range_in(*array);
    const auto access = static_cast<Access>(pick(3));
    const Stream where = stream();
    void* address = nullptr;
    try {
      pool_->acquire({&range, 1}, access, {&address, 1}, where);
    } catch (const OutOfMemory&) {
      EXPECT_FALSE(acquired_.empty()) << "nothing is acquired, and " << range.size_bytes
                                      << " bytes of " << kBudgetBytes << " had no room";
      return;
    }
    acquired_.push_back({range, where, array});
    ++array->acquired;
    auto* const expected = array->expected.data() + (static_cast<char*>(range.data) - array->data);
    const std::vector<char> before(expected, expected + range.size_bytes);
    std::vector<char> after = before;
    if (access != Access::kRead) {
      for (char& value : after) value = byte();
      std::copy(after.begin(), after.end(), expected);
    }
    driver_->queue(where, [=, this] {
      if (range.size_bytes == 0) return;
      if (access != Access::kWrite && std::memcmp(address, before.data(), before.size()) != 0) {
        ++wrong_;
      }
      std::memcpy(address, after.data(), after.size());
    });
  }

  void release(size_t index) {
    const Acquired given = acquired_[index];
    pool_->release({&given.range, 1}, given.stream);
    acquired_.erase(acquired_.begin() + static_cast<ptrdiff_t>(index));
    --given.array->acquired;
  }

  void expect_on_host(const Array& array) {
    const auto size_bytes = static_cast<int64_t>(array.expected.size());
    for (Stream where : {Stream::from_handle(&streams_[0]), Stream::from_handle(&streams_[1])}) {
      pool_->host_view({array.data, size_bytes}, where);
    }
    EXPECT_EQ(std::memcmp(array.data, array.expected.data(), array.expected.size()), 0);
  }

  void host_writes() {
    Array* const array = idle_array();
    if (array == nullptr) return;
    expect_on_host(*array);
    for (char& value : array->expected) value = byte();
    std::memcpy(array->data, array->expected.data(), array->expected.size());
  }

  const bool has_failures_;
  std::mt19937_64 random_;
  char streams_[2] = {};
  SimulatedDriver* driver_;
  std::unique_ptr<detail::PagedPoolState> pool_;
  std::vector<std::unique_ptr<Array>> arrays_;
  std::vector<Acquired> acquired_;
  int wrong_ = 0;
  int failures_ = 0;
};

TEST(PagedRandom, TheLastBytesWrittenAreFound) {
  PagedPoolStats total;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(seed);
    Program program(Backing::kPinned, seed, false);
    program.run(600);
    const PagedPoolStats stats = program.stats();
    total.prefetches += stats.prefetches;
    total.evictions += stats.evictions;
    total.bytes_to_host += stats.bytes_to_host;
    program.finish();
    if (HasFailure()) return;
  }
  // The programs did what they are there for.
  EXPECT_GT(total.prefetches, 1000);
  EXPECT_GT(total.evictions, 1000);
  EXPECT_GT(total.bytes_to_host, 1 << 20);
}

TEST(PagedRandom, TheyAreFoundAfterFailuresToo) {
  int failures = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(seed);
    Program program(Backing::kPinned, seed, true);
    program.run(600);
    program.finish();
    failures += program.failures();
    if (HasFailure()) return;
  }
  EXPECT_GT(failures, 1000);
}

}  // namespace
}  // namespace qlora_native::testing
