// What a pool decides: what moves, when, and what it refuses; on a simulated device.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "paged_pool_state.h"
#include "qlora_native/error.h"
#include "support/simulated_driver.h"

namespace qlora_native::testing {
namespace {

constexpr int64_t kKiB = 1024;
constexpr int64_t kRegionBytes = 64 * kKiB;
constexpr int64_t kBudgetBytes = 8 * kKiB;

/// A pool with its driver, and one stream of the caller's.
class Simulated {
 public:
  explicit Simulated(Backing backing) {
    auto made = std::make_unique<SimulatedDriver>(backing);
    driver = made.get();
    pool = std::make_unique<detail::PagedPoolState>(
        PagedPoolOptions{.device = Device::cuda(0),
                         .backing = backing,
                         .region_bytes = kRegionBytes,
                         .device_budget_bytes = kBudgetBytes},
        std::move(made));
  }

  PagedRange allocate(int64_t size_bytes) {
    return {pool->allocate(size_bytes, stream), size_bytes};
  }
  std::vector<PagedRange> allocate(int count, int64_t size_bytes) {
    std::vector<PagedRange> ranges;
    for (int i = 0; i < count; ++i) ranges.push_back(allocate(size_bytes));
    return ranges;
  }
  void* acquire(PagedRange range, Access access = Access::kReadWrite) {
    void* address = nullptr;
    pool->acquire({&range, 1}, access, {&address, 1}, stream);
    return address;
  }
  void release(PagedRange range) { pool->release({&range, 1}, stream); }
  void use(PagedRange range, Access access = Access::kReadWrite) {
    acquire(range, access);
    release(range);
  }

  char handle = 0;
  Stream stream = Stream::from_handle(&handle);
  SimulatedDriver* driver = nullptr;
  std::unique_ptr<detail::PagedPoolState> pool;
};

/// The message of what `action` throws.
template <class Exception, class Action>
std::string message_of(const Action& action) {
  try {
    action();
  } catch (const Exception& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

#define EXPECT_SAYS(message, words) EXPECT_NE((message).find(words), std::string::npos) << (message)

class AnyBacking : public ::testing::TestWithParam<Backing> {};

TEST_P(AnyBacking, ManySmallAllocationsShareRegions) {
  Simulated s(GetParam());
  const std::vector<PagedRange> ranges = s.allocate(200, 300);
  EXPECT_EQ(s.driver->regions(), 2);  // 200 * 512 bytes in regions of 64 KiB
  EXPECT_EQ(s.pool->stats().used_bytes, 200 * 512);
  EXPECT_EQ(s.pool->stats().reserved_bytes, 2 * kRegionBytes);
  for (const PagedRange& range : ranges) s.pool->deallocate(range.data, s.stream);
  EXPECT_EQ(s.pool->stats().peak_used_bytes, 200 * 512);
  EXPECT_EQ(s.pool->stats().used_bytes, 0);
}

TEST_P(AnyBacking, ALargeAllocationHasARegionOfItsOwnWhichGoesWithIt) {
  Simulated s(GetParam());
  const PagedRange large = s.allocate(3 * kRegionBytes);
  const PagedRange small = s.allocate(1);
  EXPECT_EQ(s.pool->stats().reserved_bytes, 4 * kRegionBytes);
  s.pool->deallocate(large.data, s.stream);
  s.driver->drain();
  s.pool->deallocate(small.data, s.stream);
  s.driver->drain();
  s.pool->deallocate(s.allocate(1).data, s.stream);
  EXPECT_EQ(s.pool->stats().reserved_bytes, kRegionBytes) << "one is kept for reuse";
  s.driver->drain();
  s.pool->trim();
  EXPECT_EQ(s.driver->region_bytes(), 0);
}

TEST_P(AnyBacking, MemoryIsReusedOnlyAfterItsLastUse) {
  Simulated s(GetParam());
  s.driver->set_memory_limit(kRegionBytes + kBudgetBytes);
  const PagedRange first = s.allocate(kRegionBytes);
  bool used = false;
  s.driver->queue(s.stream, [&] { used = true; });
  s.pool->deallocate(first.data, s.stream);
  EXPECT_SAYS(message_of<OutOfMemory>([&] { s.allocate(1); }), "no memory for 1 bytes");
  EXPECT_FALSE(used);
  s.driver->drain();
  EXPECT_TRUE(used);
  EXPECT_EQ(s.allocate(kRegionBytes).data, first.data);
}

TEST_P(AnyBacking, FailureToAllocateChangesNothing) {
  Simulated s(GetParam());
  s.driver->set_memory_limit(kRegionBytes);
  s.allocate(100);
  const std::string message = message_of<OutOfMemory>([&] { s.allocate(kRegionBytes); });
  EXPECT_SAYS(message, "no memory for 65536 bytes");
  EXPECT_SAYS(message, "256 bytes in 1 allocations in use of 65536 bytes reserved");
  EXPECT_SAYS(message, name(GetParam()));
  EXPECT_EQ(s.pool->stats().allocations, 1);
  EXPECT_EQ(s.pool->stats().used_bytes, 256);
  EXPECT_NE(s.allocate(1000).data, nullptr);
}

TEST_P(AnyBacking, AnEmptyRegionMakesRoomForALargerOne) {
  Simulated s(GetParam());
  s.driver->set_memory_limit(2 * kRegionBytes);
  s.pool->deallocate(s.allocate(1).data, s.stream);
  s.driver->drain();
  EXPECT_NE(s.allocate(2 * kRegionBytes).data, nullptr);
  EXPECT_EQ(s.driver->regions(), 1);
}

TEST_P(AnyBacking, WrongRangesAreRefused) {
  Simulated s(GetParam());
  const PagedRange range = s.allocate(100);
  const PagedRange other = s.allocate(100);
  auto* const data = static_cast<char*>(range.data);
  const PagedRange wrong[] = {{data, 101},       {data + 1, 100}, {data - 1, 1},    {data, -1},
                              {data + 256, 101}, {&s, 1},         {data, INT64_MAX}};
  for (const PagedRange& bad : wrong) {
    EXPECT_SAYS(message_of<InvalidArgument>([&] { s.acquire(bad); }),
                "does not lie in one live allocation");
    EXPECT_THROW(s.release(bad), InvalidArgument);
    EXPECT_THROW(s.pool->prefetch({&bad, 1}, s.stream), InvalidArgument);
    EXPECT_THROW(s.pool->evict({&bad, 1}, s.stream), InvalidArgument);
    EXPECT_THROW(s.pool->plan({&bad, 1}), InvalidArgument);
    EXPECT_THROW(s.pool->host_view(bad, s.stream), InvalidArgument);
  }
  EXPECT_THROW(s.pool->deallocate(data + 1, s.stream), InvalidArgument);
  EXPECT_THROW(s.release(range), InvalidArgument);
  s.acquire(range);
  EXPECT_SAYS(message_of<InvalidArgument>([&] { s.pool->deallocate(data, s.stream); }),
              "is acquired");
  EXPECT_THROW(s.pool->host_view(range, s.stream), InvalidArgument);
  EXPECT_THROW(s.release(other), InvalidArgument);
  const PagedRange twice[] = {range, range};
  EXPECT_THROW(s.pool->release(twice, s.stream), InvalidArgument);
  s.release(range);
  EXPECT_THROW(s.release(range), InvalidArgument);
  s.pool->deallocate(data, s.stream);
  EXPECT_THROW(s.acquire(range), InvalidArgument);
}

TEST_P(AnyBacking, CapturesAreNotDisturbed) {
  Simulated s(GetParam());
  const PagedRange range = s.allocate(100);
  const PagedRange dying = s.allocate(kRegionBytes);
  s.use(range);
  s.driver->drain();
  s.driver->set_capturing(s.stream, true);
  EXPECT_SAYS(message_of<Unsupported>([&] { s.allocate(1); }), "captured");
  EXPECT_THROW(s.pool->prefetch({&range, 1}, s.stream), Unsupported);
  EXPECT_THROW(s.pool->evict({&range, 1}, s.stream), Unsupported);
  EXPECT_THROW(s.pool->host_view(range, s.stream), Unsupported);
  const int calls = s.driver->calls();
  if (GetParam() == Backing::kManaged) {
    EXPECT_EQ(s.acquire(range), range.data);
    s.release(range);
  } else {
    EXPECT_SAYS(message_of<Unsupported>([&] { s.acquire(range); }), "captured");
  }
  EXPECT_EQ(s.driver->calls(), calls);
  // What dies during the capture is asked about after it.
  s.pool->deallocate(dying.data, s.stream);
  s.driver->set_capturing(s.stream, false);
  s.pool->trim();
  s.driver->drain();
  s.pool->trim();
  EXPECT_EQ(s.pool->stats().reserved_bytes, kRegionBytes);
}

INSTANTIATE_TEST_SUITE_P(PagedPool, AnyBacking,
                         ::testing::Values(Backing::kManaged, Backing::kPinned),
                         [](const auto& info) { return std::string(name(info.param)); });

// ---- Managed ----

TEST(ManagedPool, AcquireBringsWhatIsMissingWithFewCalls) {
  Simulated s(Backing::kManaged);
  const std::vector<PagedRange> ranges = s.allocate(10, 300);
  std::vector<void*> addresses(10);
  s.pool->acquire(ranges, Access::kRead, addresses, s.stream);
  for (size_t i = 0; i < 10; ++i) EXPECT_EQ(addresses[i], ranges[i].data);
  ASSERT_EQ(s.driver->moves_to_device().size(), 1u) << "neighbours are moved together";
  EXPECT_EQ(s.driver->moves_to_device()[0], (PagedRange{ranges[0].data, 9 * 512 + 300}));
  EXPECT_EQ(s.pool->stats().device_resident_bytes, 3000);
  s.pool->release(ranges, s.stream);
  s.driver->drain();
  const int calls = s.driver->calls();
  s.pool->acquire(ranges, Access::kReadWrite, addresses, s.stream);
  s.pool->release(ranges, s.stream);
  EXPECT_LE(s.driver->calls(), calls + 1) << "resident memory costs no calls but one query";
  s.pool->acquire(ranges, Access::kReadWrite, addresses, s.stream);
  EXPECT_LE(s.driver->calls(), calls + 1);
}

TEST(ManagedPool, EvictedPartsAreBroughtBack) {
  Simulated s(Backing::kManaged);
  const PagedRange range = s.allocate(4 * kKiB);
  s.use(range);
  const PagedRange middle{static_cast<char*>(range.data) + kKiB, kKiB};
  s.pool->evict({&middle, 1}, s.stream);
  EXPECT_EQ(s.driver->moves_to_host(), std::vector{middle});
  EXPECT_EQ(s.pool->stats().device_resident_bytes, 3 * kKiB);
  s.pool->prefetch({&range, 1}, s.stream);
  EXPECT_EQ(s.driver->moves_to_device().back(), middle);
  const PagedPoolStats stats = s.pool->stats();
  EXPECT_EQ(stats.prefetches, 1);
  EXPECT_EQ(stats.evictions, 1);
  EXPECT_EQ(stats.bytes_to_device, 5 * kKiB);
  EXPECT_EQ(stats.bytes_to_host, kKiB);
  s.driver->drain();
}

TEST(ManagedPool, EvictionWaitsForTheCallersWork) {
  Simulated s(Backing::kManaged);
  const PagedRange range = s.allocate(kKiB);
  bool worked = false;
  s.driver->queue(s.stream, [&] { worked = true; });
  s.pool->evict({&range, 1}, s.stream);
  bool moved_after = false;
  s.driver->queue(s.driver->to_host_stream(), [&] { moved_after = worked; });
  s.driver->drain();
  EXPECT_TRUE(moved_after);
}

TEST(ManagedPool, APlanIsBroughtAhead) {
  Simulated s(Backing::kManaged);
  const std::vector<PagedRange> ranges = s.allocate(20, kKiB);
  s.pool->plan(ranges);
  EXPECT_TRUE(s.driver->moves_to_device().empty());
  s.use(ranges[0]);
  EXPECT_EQ(s.pool->stats().device_resident_bytes, 20 * kKiB);
  EXPECT_EQ(s.pool->stats().prefetches, 19);
  EXPECT_EQ(s.driver->moves_to_device().size(), 2u);
}

// ---- Pinned ----

TEST(PinnedPool, DeviceMemoryStaysWithinTheBudget) {
  Simulated s(Backing::kPinned);
  const std::vector<PagedRange> ranges = s.allocate(40, kKiB);
  EXPECT_EQ(s.driver->staging_bytes(), 0);
  s.pool->plan(ranges);
  for (const PagedRange& range : ranges) {
    s.use(range);
    EXPECT_LE(s.pool->stats().device_resident_bytes, kBudgetBytes);
  }
  EXPECT_EQ(s.driver->staging_bytes(), kBudgetBytes);
  const PagedPoolStats stats = s.pool->stats();
  EXPECT_EQ(stats.bytes_to_device, 40 * kKiB) << "each range was copied once";
  EXPECT_EQ(stats.bytes_to_host, 32 * kKiB) << "and what is still there was not written back";
  EXPECT_EQ(stats.prefetches, 40);
  s.driver->drain();
}

TEST(PinnedPool, TheLeastRecentlyUsedGoes) {
  Simulated s(Backing::kPinned);
  const std::vector<PagedRange> ranges = s.allocate(9, kKiB);
  for (int i = 0; i < 8; ++i) s.use(ranges[static_cast<size_t>(i)], Access::kRead);
  s.use(ranges[0], Access::kRead);
  s.use(ranges[8], Access::kRead);  // takes the place of 1
  const int64_t before = s.pool->stats().bytes_to_device;
  s.use(ranges[0], Access::kRead);
  EXPECT_EQ(s.pool->stats().bytes_to_device, before);
  s.use(ranges[1], Access::kRead);
  EXPECT_EQ(s.pool->stats().bytes_to_device, before + kKiB);
  EXPECT_EQ(s.pool->stats().bytes_to_host, 0) << "what was only read needs no way back";
}

TEST(PinnedPool, WhatIsOnlyWrittenIsNotBrought) {
  Simulated s(Backing::kPinned);
  const PagedRange range = s.allocate(kKiB);
  void* const staged = s.acquire(range, Access::kWrite);
  s.driver->queue(s.stream, [=] { std::memset(staged, 5, kKiB); });
  s.release(range);
  EXPECT_EQ(s.pool->stats().bytes_to_device, 0);
  EXPECT_EQ(static_cast<char*>(s.pool->host_view(range, s.stream))[kKiB - 1], 5);
}

TEST(PinnedPool, NoRoomBesideWhatIsAcquired) {
  Simulated s(Backing::kPinned);
  const std::vector<PagedRange> ranges = s.allocate(2, 5 * kKiB);
  s.acquire(ranges[0]);
  const std::string message = message_of<OutOfMemory>([&] { s.acquire(ranges[1]); });
  EXPECT_SAYS(message, "5120 bytes in the staging cache of 8192 bytes");
  EXPECT_SAYS(message, "1 ranges acquired");
  s.release(ranges[0]);
  s.use(ranges[1]);
  const PagedRange large = s.allocate(kBudgetBytes + 1);
  EXPECT_THROW(s.acquire(large), OutOfMemory);
  const PagedRange most{large.data, kBudgetBytes};
  s.use(most);
  s.driver->drain();
}

TEST(PinnedPool, AFailedBatchAcquiresNothing) {
  Simulated s(Backing::kPinned);
  const std::vector<PagedRange> ranges = s.allocate(3, 3 * kKiB);
  std::vector<void*> addresses(3);
  for (const Access access : {Access::kWrite, Access::kReadWrite}) {
    std::memset(ranges[0].data, 9, 3 * kKiB);
    EXPECT_THROW(s.pool->acquire(ranges, access, addresses, s.stream), OutOfMemory);
    for (const PagedRange& range : ranges) EXPECT_THROW(s.release(range), InvalidArgument);
    EXPECT_EQ(static_cast<char*>(s.pool->host_view(ranges[0], s.stream))[0], 9);
  }
}

TEST(PinnedPool, OverlappingRangesAreRefusedWhileAcquiredAndServedAfterwards) {
  Simulated s(Backing::kPinned);
  const PagedRange whole = s.allocate(4 * kKiB);
  auto* const data = static_cast<char*>(whole.data);
  const PagedRange left{data, 3 * kKiB};
  const PagedRange right{data + kKiB, 3 * kKiB};
  const PagedRange inner{data + kKiB, kKiB};
  auto* const staged = static_cast<char*>(s.acquire(left));
  EXPECT_EQ(s.acquire(inner), staged + kKiB) << "a part of what is there is there";
  s.release(inner);
  EXPECT_SAYS(message_of<InvalidArgument>([&] { s.acquire(right); }), "without being part of it");
  s.release(left);
  s.use(right);
  s.use(whole);
  s.driver->drain();
}

TEST(PinnedPool, APlanForgetsWhatIsDeallocated) {
  Simulated s(Backing::kPinned);
  const std::vector<PagedRange> ranges = s.allocate(20, kKiB);
  s.pool->plan(ranges);
  for (size_t i = 10; i < 20; ++i) s.pool->deallocate(ranges[i].data, s.stream);
  for (size_t i = 0; i < 10; ++i) s.use(ranges[i]);
  EXPECT_EQ(s.pool->stats().bytes_to_device, 10 * kKiB);
  s.driver->drain();
}

TEST(PinnedPool, NothingIsReleasedInACapture) {
  Simulated s(Backing::kPinned);
  const PagedRange range = s.allocate(kKiB);
  s.acquire(range);
  s.driver->set_capturing(s.stream, true);
  EXPECT_SAYS(message_of<Unsupported>([&] { s.release(range); }), "captured");
  s.driver->set_capturing(s.stream, false);
  s.release(range);
  EXPECT_THROW(s.release(range), InvalidArgument) << "it was acquired once";
  s.driver->drain();
}

TEST(PinnedPool, APlanBringsNothingThatTheHostWasShown) {
  Simulated s(Backing::kPinned);
  const std::vector<PagedRange> ranges = s.allocate(20, kKiB);
  s.pool->plan(ranges);
  s.pool->host_view(ranges[10], s.stream);
  for (size_t i = 0; i < 8; ++i) s.use(ranges[i]);
  s.driver->drain();
  // Beyond what the pool sees; a copy that was made ahead would not have it.
  std::memset(ranges[10].data, 7, kKiB);
  const auto* const staged = static_cast<const char*>(s.acquire(ranges[10], Access::kRead));
  s.driver->drain();
  EXPECT_EQ(staged[0], 7);
}

TEST(PinnedPool, APrefetchStopsWhereTheBudgetEnds) {
  Simulated s(Backing::kPinned);
  const std::vector<PagedRange> ranges = s.allocate(20, kKiB);
  s.pool->prefetch(ranges, s.stream);
  EXPECT_EQ(s.pool->stats().prefetches, 8);
  EXPECT_EQ(s.pool->stats().evictions, 0) << "the first are wanted first";
  s.use(ranges[19]);
  EXPECT_EQ(s.pool->stats().evictions, 1) << "an acquire comes before any wish";
  s.driver->drain();
}

}  // namespace
}  // namespace qlora_native::testing
