// The counter-based random numbers and the masks made of them.
#include "dropout_mask.h"

#include <gtest/gtest.h>

#include <cmath>

#include "support/lora_model.h"

namespace qlora_native::testing {
namespace {

void expect_words(const RandomWords& actual, const std::vector<uint32_t>& expected) {
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(actual.words[i], expected[i]) << i;
}

/// The known answers that the authors of Philox publish with Random123, for philox4x32_10.
TEST(Philox, GivesTheKnownAnswers) {
  expect_words(philox(0, 0, 0, 0), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  expect_words(philox(~uint64_t{0}, ~uint64_t{0}, ~uint32_t{0}, ~uint32_t{0}),
               {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  expect_words(philox(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x13198a2e, 0x03707344),
               {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

/// A mask can be known while compiling.
static_assert(dropout_mask({0.0f, 1, 2}, 9).kept(3, 1) == kAllKept);
static_assert(dropout_mask({1.0f, 1, 2}, 9).kept(3, 1) == 0);
static_assert(dropout_mask({0.5f, 1, 2}, 17).units_per_row == 3);

TEST(DropoutMask, IsTheDefinition) {
  const Dropout dropout{0.37f, 0x0123456789abcdef, 0xfedcba9876543210};
  for (const int64_t cols : {1, 8, 9, 61}) {
    const DropoutMask mask = dropout_mask(dropout, cols);
    // The last rows need more than 32 bits of the counter.
    for (const int64_t first : {int64_t{0}, int64_t{1} << 31, int64_t{1} << 40}) {
      for (int64_t row = first; row < first + 20; ++row) {
        for (int64_t col = 0; col < cols; ++col) {
          EXPECT_EQ(mask.kept(row, col / 8) >> (col % 8) & 1u,
                    static_cast<uint32_t>(is_kept(dropout, cols, row, col)));
        }
      }
    }
  }
}

TEST(DropoutMask, ThresholdAndScaleAreThoseOfTheRoundedProbability) {
  EXPECT_FALSE(dropout_mask({0.0f, 1, 2}, 8).drops());
  EXPECT_FALSE(dropout_mask({0.000007f, 1, 2}, 8).drops());
  EXPECT_EQ(dropout_mask({0.0f, 1, 2}, 8).scale, 1.0f);
  EXPECT_EQ(dropout_mask({0.000008f, 1, 2}, 8).threshold, 1u);
  EXPECT_EQ(dropout_mask({0.1f, 1, 2}, 8).threshold, 6554u);
  EXPECT_EQ(dropout_mask({0.1f, 1, 2}, 8).scale, static_cast<float>(65536.0 / (65536 - 6554)));
  EXPECT_EQ(dropout_mask({0.5f, 1, 2}, 8).scale, 2.0f);
  EXPECT_EQ(dropout_mask({1.0f, 1, 2}, 8).scale, 0.0f);
}

/// Counts within five standard deviations of a binomial distribution: of all elements, of each
/// column of a unit, and of neighbours that are both dropped.
TEST(DropoutMask, DropsTheProbabilityIndependently) {
  constexpr int64_t kRowCount = 2000;
  constexpr int64_t kUnits = 16;
  for (const double p : {0.05, 0.1, 0.5, 0.9}) {
    const Dropout dropout{static_cast<float>(p), 42, 7};
    const DropoutMask mask = dropout_mask(dropout, 8 * kUnits);
    int64_t by_column[8] = {};
    int64_t both_columns = 0;
    int64_t both_rows = 0;
    for (int64_t row = 0; row < kRowCount; ++row) {
      for (int64_t unit = 0; unit < kUnits; ++unit) {
        const uint32_t dropped = ~mask.kept(row, unit) & kAllKept;
        const uint32_t below = ~mask.kept(row + 1, unit) & kAllKept;
        for (int i = 0; i < 8; ++i) by_column[i] += dropped >> i & 1u;
        both_columns += __builtin_popcount(dropped & dropped >> 1);
        both_rows += __builtin_popcount(dropped & below);
      }
    }
    const auto expect_count = [](int64_t count, double probability, int64_t of) {
      const double mean = probability * static_cast<double>(of);
      EXPECT_NEAR(static_cast<double>(count), mean, 5 * std::sqrt(mean * (1 - probability)));
    };
    int64_t all = 0;
    for (const int64_t count : by_column) {
      expect_count(count, p, kRowCount * kUnits);
      all += count;
    }
    expect_count(all, p, kRowCount * kUnits * 8);
    expect_count(both_columns, p * p, kRowCount * kUnits * 7);
    expect_count(both_rows, p * p, kRowCount * kUnits * 8);
  }
}

TEST(DropoutMask, AnotherSeedOrOffsetIsAnotherMask) {
  const auto dropped_with = [](uint64_t seed, uint64_t offset) {
    const DropoutMask mask = dropout_mask({0.5f, seed, offset}, 8);
    std::vector<uint32_t> bits;
    for (int64_t row = 0; row < 64; ++row) bits.push_back(mask.kept(row, 0));
    return bits;
  };
  const std::vector<uint32_t> first = dropped_with(1, 2);
  EXPECT_EQ(first, dropped_with(1, 2));
  EXPECT_NE(first, dropped_with(2, 2));
  EXPECT_NE(first, dropped_with(1 + (uint64_t{1} << 32), 2));
  EXPECT_NE(first, dropped_with(1, 3));
  EXPECT_NE(first, dropped_with(1, 2 + (uint64_t{1} << 32)));
}

}  // namespace
}  // namespace qlora_native::testing
