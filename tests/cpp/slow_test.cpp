// More than 2^31 elements. Needs 12 GB of memory and some minutes: run with
// QLORA_NATIVE_SLOW_TESTS=1.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>

#include "qlora_native/qlora_native.h"

namespace qlora_native {
namespace {

bool slow_tests_wanted() {
  const char* value = std::getenv("QLORA_NATIVE_SLOW_TESTS");
  return value != nullptr && std::string(value) == "1";
}

/// A value for each position: the blocks differ, and so do the elements of a block.
uint16_t element(int64_t i) {
  constexpr uint64_t kOddConstant = 0x9E3779B97F4A7C15u;
  const uint64_t hash = (static_cast<uint64_t>(i) * kOddConstant) >> 40;
  // Any sign and mantissa, exponents from 2^-7 to 2^0.
  return static_cast<uint16_t>((hash & 0x807f) | (120 + (hash >> 8 & 7)) << 7);
}

TEST(Slow, MoreThanTwoToThe31Elements) {
  if (!slow_tests_wanted()) GTEST_SKIP() << "set QLORA_NATIVE_SLOW_TESTS=1";
  constexpr int64_t kRows = 65540;
  constexpr int64_t kCols = 32769;
  constexpr int64_t kNumel = kRows * kCols;
  static_assert(kNumel > int64_t{1} << 31);
  constexpr int64_t kBlock = 64;
  const int64_t blocks = num_blocks(kNumel, kBlock);
  auto data = std::make_unique_for_overwrite<uint16_t[]>(kNumel);
  for (int64_t i = 0; i < kNumel; ++i) data[i] = element(i);
  auto packed = std::make_unique_for_overwrite<uint8_t[]>(packed_bytes(kNumel));
  auto absmax = std::make_unique_for_overwrite<float[]>(blocks);

  QuantizeArgs quantize;
  quantize.input = {data.get(), kNumel, DType::kBFloat16, {}};
  quantize.output = {
      packed.get(), {absmax.get(), nullptr, nullptr, nullptr}, kRows, kCols, kBlock, kNF4, {}};
  quantize_4bit(quantize, {}, Stream::none());
  const QuantizedView weight{
      packed.get(), {absmax.get(), nullptr, nullptr, nullptr}, kRows, kCols, kBlock, kNF4, {}};
  dequantize_4bit({weight, {data.get(), kNumel, DType::kBFloat16, {}}}, Stream::none());

  // A sample of blocks over the whole range, each against a quantization of it alone.
  for (int64_t block = 0; block < blocks; block += block < blocks - 2000 ? 999'983 : 1) {
    const int64_t begin = block * kBlock;
    const int64_t count = std::min(kBlock, kNumel - begin);
    uint16_t values[kBlock];
    for (int64_t i = 0; i < count; ++i) values[i] = element(begin + i);
    uint8_t expected_packed[kBlock / 2];
    float expected_absmax = 0;
    QuantizeArgs alone;
    alone.input = {values, count, DType::kBFloat16, {}};
    alone.output = {
        expected_packed, {&expected_absmax, nullptr, nullptr, nullptr}, 1, count, kBlock, kNF4, {}};
    quantize_4bit(alone, {}, Stream::none());
    ASSERT_EQ(absmax[block], expected_absmax) << "block " << block;
    for (int64_t i = 0; i < packed_bytes(count); ++i) {
      ASSERT_EQ(packed[begin / 2 + i], expected_packed[i]) << "byte " << begin / 2 + i;
    }
    const QuantizedView alone_view{
        expected_packed, {&expected_absmax, nullptr, nullptr, nullptr}, 1, count, kBlock, kNF4, {}};
    dequantize_4bit({alone_view, {values, count, DType::kBFloat16, {}}}, Stream::none());
    for (int64_t i = 0; i < count; ++i)
      ASSERT_EQ(data[begin + i], values[i]) << "element " << begin + i;
  }

  // One row of X against the last rows: their offsets in W are beyond 2^31.
  std::vector<float> x(kCols, 0.0f);
  x[kCols - 1] = 1.0f;
  std::vector<float> y(kRows);
  const MatmulArgs matmul{{x.data(), 1, kCols, kCols, DType::kFloat32, {}},
                          weight,
                          {},
                          {y.data(), 1, kRows, kRows, DType::kFloat32, {}}};
  std::vector<char> workspace(static_cast<size_t>(matmul_4bit_workspace_bytes(matmul)));
  matmul_4bit(matmul, {workspace.data(), static_cast<int64_t>(workspace.size())}, Stream::none());
  for (const int64_t row : {int64_t{0}, kRows / 2, kRows - 1}) {
    const int64_t last = row * kCols + kCols - 1;
    const uint8_t byte = packed[last / 2];
    const uint8_t code = last % 2 == 0 ? first_nibble(byte) : second_nibble(byte);
    EXPECT_EQ(y[row], kNF4.values[code] * absmax[last / kBlock]) << "row " << row;
  }
}

}  // namespace
}  // namespace qlora_native
