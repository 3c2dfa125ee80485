// The tables of codebook.h against their definitions, recomputed in fp64.
#include "qlora_native/codebook.h"
#include "nearest_code.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "qlora_native/stream.h"
#include "support/problem.h"

namespace qlora_native {
namespace {

const Codebook kAllCodebooks[] = {kNF4, kFP4, kINT4, testing::uneven_codebook()};

/// Inverse of the standard normal distribution, by bisection.
double normal_quantile(double p) {
  double low = -10;
  double high = 10;
  for (int i = 0; i < 200; ++i) {
    const double middle = (low + high) / 2;
    (std::erfc(-middle / std::sqrt(2.0)) / 2 < p ? low : high) = middle;
  }
  return low;
}

TEST(Codebook, Nf4HoldsTheQuantilesOfTheNormalDistribution) {
  // QLoRA, appendix E: 8 positive and 7 negative values from evenly spaced probabilities, and zero.
  const double outermost = (1.0 - 1.0 / 30 + 1.0 - 1.0 / 32) / 2;
  std::vector<double> expected = {0.0};
  for (int i = 0; i < 8; ++i) {
    expected.push_back(normal_quantile(outermost + (0.5 - outermost) * i / 8));
    if (i < 7) expected.push_back(-normal_quantile(outermost + (0.5 - outermost) * i / 7));
  }
  std::sort(expected.begin(), expected.end());
  const double largest = expected.back();
  ASSERT_EQ(expected.size(), 16u);
  for (size_t i = 0; i < 16; ++i) EXPECT_NEAR(kNF4.values[i], expected[i] / largest, 1e-6) << i;
  EXPECT_EQ(kNF4.values[0], -1.0f);
  EXPECT_EQ(kNF4.values[7], 0.0f);
  EXPECT_EQ(kNF4.values[15], 1.0f);
}

TEST(Codebook, Fp4HoldsTwelfths) {
  const double twelfths[8] = {0, 0.0625, 8, 12, 4, 6, 2, 3};
  for (int i = 0; i < 8; ++i) {
    EXPECT_NEAR(kFP4.values[i], twelfths[i] / 12, 1e-7) << i;
    EXPECT_EQ(kFP4.values[i + 8], -kFP4.values[i]) << i;
  }
}

TEST(Codebook, Int4IsSymmetric) {
  for (int i = 0; i < 16; ++i) EXPECT_EQ(kINT4.values[i], static_cast<float>((i - 8) / 7.0)) << i;
}

TEST(Codebook, DecisionPointsLieBetweenTheValuesTheySeparate) {
  for (const Codebook& book : kAllCodebooks) {
    SCOPED_TRACE(name(book.type));
    for (int i = 0; i < 15; ++i) {
      const double low = book.values[book.code_of_rank[i]];
      const double high = book.values[book.code_of_rank[i + 1]];
      EXPECT_LE(low, high);
      EXPECT_NEAR(book.decision_points[i], (low + high) / 2, 1e-6) << i;
      if (i > 0) {
        EXPECT_LT(book.decision_points[i - 1], book.decision_points[i]);
      }
      if (book.type != QuantType::kFP4) {
        EXPECT_EQ(book.decision_points[i], static_cast<float>((low + high) / 2)) << i;
      }
    }
  }
}

TEST(Codebook, EveryCodeEncodesItsOwnValue) {
  for (const Codebook& book : kAllCodebooks) {
    SCOPED_TRACE(name(book.type));
    for (uint8_t code = 0; code < 16; ++code) {
      // Minus zero compares like zero, so FP4's two zeros share a code.
      const uint8_t expected = book.values[code] == 0 && std::signbit(book.values[code]) ? 0 : code;
      EXPECT_EQ(encode_4bit(book, book.values[code]), expected) << int{code};
    }
    EXPECT_EQ(encode_4bit(book, 0.0f), book.zero_code);
  }
}

TEST(Codebook, Fp4KeepsTheSignOfAValueThatUnderflows) {
  constexpr float kTiny = std::numeric_limits<float>::denorm_min();
  EXPECT_EQ(encode_4bit(kFP4, kTiny), 0);
  EXPECT_EQ(encode_4bit(kFP4, 0.0f), 0);
  EXPECT_EQ(encode_4bit(kFP4, -0.0f), 0);
  EXPECT_EQ(encode_4bit(kFP4, -kTiny), 8);
}

TEST(Codebook, Fp4IsSymmetricAtItsThresholds) {
  for (int i = 0; i < 7; ++i) {
    const float threshold = kFP4.decision_points[8 + i];
    for (const float x :
         {threshold, std::nextafter(threshold, 0.0f), std::nextafter(threshold, 1.0f)}) {
      EXPECT_EQ(encode_4bit(kFP4, -x), encode_4bit(kFP4, x) | 8) << x;
    }
  }
}

TEST(DynamicMap, HoldsTheSlicesOfItsDecades) {
  std::vector<double> expected = {0.0, 1.0};
  for (int decade = 0; decade < 7; ++decade) {
    const int slices = 1 << decade;
    for (int i = 0; i < slices; ++i) {
      const double centre = 0.1 + 0.9 * (i + 0.5) / slices;
      expected.push_back(centre * std::pow(10.0, decade - 6));
      expected.push_back(-expected.back());
    }
  }
  std::sort(expected.begin(), expected.end());
  ASSERT_EQ(expected.size(), 256u);
  for (size_t i = 0; i < 256; ++i) {
    EXPECT_NEAR(kSignedDynamicMap.values[i], expected[i], 2e-7 * std::fabs(expected[i])) << i;
  }
  EXPECT_EQ(kSignedDynamicMap.values[kSignedDynamicZeroCode], 0.0f);
}

TEST(DynamicMap, TheUnsignedOneHasTwiceAsManySlices) {
  std::vector<double> expected = {0.0};
  for (int decade = 0; decade < 7; ++decade) {
    const int slices = 2 << decade;
    for (int i = 0; i < slices; ++i) {
      expected.push_back((0.1 + 0.9 * (i + 0.5) / slices) * std::pow(10.0, decade - 6));
    }
  }
  expected.push_back(1.0);
  ASSERT_EQ(expected.size(), 256u);
  for (size_t i = 0; i < 256; ++i) {
    EXPECT_NEAR(kUnsignedDynamicMap.values[i], expected[i], 2e-7 * expected[i]) << i;
  }
}

/// The bisection and the tables, around every decision point of a map.
template <class Table>
void expect_nearest(const DynamicMap& map, const Table& table) {
  const auto distance = [&](float x, int i) {
    return std::fabs(static_cast<long double>(x) - map.values[i]);
  };
  for (int i = 0; i < 255; ++i) {
    const float point = map.decision_points[i];
    for (const float x : {std::nextafter(point, -2.0f), point, std::nextafter(point, 2.0f)}) {
      const int nearest = distance(x, i + 1) < distance(x, i) ? i + 1 : i;
      EXPECT_EQ(encode_dynamic(map, x), nearest) << x;
      EXPECT_EQ(nearest_code(table, x), nearest) << x;
    }
  }
  for (const float x : {0.0f, 1.0f, 1.1f, 1e-30f, std::numeric_limits<float>::denorm_min()}) {
    EXPECT_EQ(nearest_code(table, x), encode_dynamic(map, x)) << x;
  }
}

TEST(DynamicMap, EncodesTheNearestEntryOfEveryNeighbourhood) {
  expect_nearest(kSignedDynamicMap, kSignedCodeTable);
  expect_nearest(kUnsignedDynamicMap, kUnsignedCodeTable);
  EXPECT_EQ(nearest_code(kSignedCodeTable, -1.0f), 0);
  EXPECT_EQ(encode_dynamic(kSignedDynamicMap, -1.0f), 0);
  EXPECT_EQ(encode_dynamic(kSignedDynamicMap, 1.0f), 255);
}

TEST(Codebook, SizesRoundUp) {
  EXPECT_EQ(packed_bytes(0), 0);
  EXPECT_EQ(packed_bytes(1), 1);
  EXPECT_EQ(packed_bytes(2), 1);
  EXPECT_EQ(packed_bytes(std::numeric_limits<int64_t>::max()), int64_t{1} << 62);
  EXPECT_EQ(num_blocks(0, 64), 0);
  EXPECT_EQ(num_blocks(65, 64), 2);
  EXPECT_EQ(num_groups(256), 1);
  EXPECT_EQ(num_groups(257), 2);
  EXPECT_EQ(pack_nibbles(0xA, 0x5), 0xA5);
  EXPECT_EQ(first_nibble(0xA5), 0xA);
  EXPECT_EQ(second_nibble(0xA5), 0x5);
}

TEST(Codebook, BlockSizesArePowersOfTwoFrom32To4096) {
  for (int64_t size = -1; size <= 8192; ++size) {
    const bool expected = size == 32 || size == 64 || size == 128 || size == 256 || size == 512 ||
                          size == 1024 || size == 2048 || size == 4096;
    EXPECT_EQ(is_valid_block_size(size), expected) << size;
  }
}

// A stream is always asked for by name.
static_assert(!std::is_default_constructible_v<Stream>);
static_assert(!std::is_constructible_v<Stream, int>);
static_assert(!std::is_constructible_v<Stream, std::nullptr_t>);
static_assert(!std::is_constructible_v<Stream, void*>);

}  // namespace
}  // namespace qlora_native
