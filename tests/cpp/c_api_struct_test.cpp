// The rule of struct_size, on a struct with a history, which those of the C ABI do not have yet.
#include "c_api_struct.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace qlora_native::c_api {
namespace {

/// Began with `first`, then got `second`, then `third`.
struct Grown {
  uint64_t struct_size;
  int64_t first;
  int64_t second;
  int64_t third;
};
constexpr uint64_t kGrownSizes[] = {offsetof(Grown, second), offsetof(Grown, third)};

}  // namespace

template <>
inline constexpr std::span<const uint64_t> kEarlierSizes<Grown>{kGrownSizes};

namespace {

class CApiStruct : public ::testing::Test {
 protected:
  void SetUp() override {
    const Grown filled{sizeof(Grown), 1, 2, 3};
    std::memcpy(memory_, &filled, sizeof(filled));
  }
  Grown* with_size(uint64_t size) {
    std::memcpy(memory_, &size, sizeof(size));
    return reinterpret_cast<Grown*>(memory_);
  }
  Grown read(uint64_t size) { return read_struct("f", "args", with_size(size)); }

  alignas(Grown) unsigned char memory_[2 * sizeof(Grown)] = {};
};

TEST_F(CApiStruct, EarlierSizesLackMembers) {
  Grown oldest = read(16);
  EXPECT_EQ(oldest.first, 1);
  EXPECT_EQ(oldest.second, 0);
  EXPECT_EQ(oldest.third, 0);
  Grown older = read(24);
  EXPECT_EQ(older.second, 2);
  EXPECT_EQ(older.third, 0);
  EXPECT_EQ(read(32).third, 3);
}

TEST_F(CApiStruct, OtherSmallerSizesAreRefused) {
  for (uint64_t size = 0; size < sizeof(Grown); ++size) {
    if (size == 16 || size == 24) continue;
    EXPECT_THROW(read(size), InvalidArgument) << size;
  }
}

TEST_F(CApiStruct, LargerSizesHaveToBeZeroBeyond) {
  EXPECT_EQ(read(40).third, 3);
  memory_[39] = 1;
  EXPECT_THROW(read(40), InvalidArgument);
  EXPECT_EQ(read(39).third, 3);
  EXPECT_THROW(read(kMaxStructBytes + 1), InvalidArgument);
}

TEST_F(CApiStruct, WritesWhatTheCallerHas) {
  write_struct(with_size(24), 24, Grown{0, 10, 20, 30});
  Grown written;
  std::memcpy(&written, memory_, sizeof(written));
  EXPECT_EQ(written.struct_size, 24u);
  EXPECT_EQ(written.first, 10);
  EXPECT_EQ(written.second, 20);
  EXPECT_EQ(written.third, 3);  // beyond the caller's struct: not ours to write

  write_struct(with_size(40), 40, Grown{0, 10, 20, 30});
  std::memcpy(&written, memory_, sizeof(written));
  EXPECT_EQ(written.struct_size, 40u);
  EXPECT_EQ(written.third, 30);
}

}  // namespace
}  // namespace qlora_native::c_api
