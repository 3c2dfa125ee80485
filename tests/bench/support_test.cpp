// The checks of qn_bench can fail.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpp/elements.h"
#include "cpp/machine.h"
#include "cpp/options.h"
#include "cpp/problem.h"
#include "cpp/verify.h"

namespace bench {
namespace {

using qlora_native::DType;

constexpr Shape kShape{64, 256};
constexpr int64_t kRows = 3;

class BenchSupport : public testing::TestWithParam<DType> {
 protected:
  static void run(const Work& work) {
    for (const auto& call : work.calls) call();
  }

  std::unique_ptr<Machine> machine_ = make_cpu_machine();
  Problem problem_{*machine_, kShape, GetParam()};
};

/// Makes the first element of an array of `dtype` one and a half of what it was, or one if zero.
void spoil(const Buffer& buffer, DType dtype) {
  const float old = HostArray(buffer, 1, dtype)[0];
  const float changed[] = {old == 0 ? 1.0f : old * 1.5f};
  const std::vector<uint8_t> raw = encode(changed, dtype);
  std::memcpy(buffer.as(), raw.data(), raw.size());
}

TEST_P(BenchSupport, QuantizedBytesAreCheckedAndAWrongCodeIsFound) {
  const Work work = problem_.quantize();
  run(work);
  EXPECT_EQ(check_quantized(problem_), "");
  EXPECT_FALSE(work.kernel.empty());
  problem_.quantized().packed.as<uint8_t>()[0] ^= 0x10;
  EXPECT_NE(check_quantized(problem_), "");
}

TEST_P(BenchSupport, AWrongScaleIsFound) {
  run(problem_.quantize());
  *problem_.quantized().offset.as<float>() += 0.01f;
  EXPECT_NE(check_quantized(problem_), "");
}

TEST_P(BenchSupport, DequantizedElementsAreCheckedAndAWrongOneIsFound) {
  run(problem_.dequantize());
  EXPECT_EQ(check_dequantized(problem_), "");
  spoil(problem_.output(), GetParam());
  EXPECT_NE(check_dequantized(problem_), "");
}

TEST_P(BenchSupport, ProductsAreCheckedAndAWrongElementIsFound) {
  const Work work = problem_.matmul(kRows);
  run(work);
  EXPECT_EQ(check_matmul(problem_, kRows), "");
  EXPECT_EQ(work.flops_per_call, 2 * kRows * kShape.n * kShape.k);
  spoil(problem_.output(), GetParam());
  EXPECT_NE(check_matmul(problem_, kRows), "");
}

TEST_P(BenchSupport, TransposedProductsAreCheckedAndAWrongElementIsFound) {
  run(problem_.matmul_transposed(kRows));
  EXPECT_EQ(check_matmul_transposed(problem_, kRows), "");
  spoil(problem_.output(), GetParam());
  EXPECT_NE(check_matmul_transposed(problem_, kRows), "");
}

TEST_P(BenchSupport, AdaptersAreCheckedAndWrongElementsAreFound) {
  constexpr int64_t kRank = 5;
  const Work forward = problem_.lora_forward(kRows, kRank);
  EXPECT_EQ(forward.flops_per_call,
            2 * kRows * (kShape.n * kShape.k + kRank * (kShape.n + kShape.k)));
  run(forward);
  EXPECT_EQ(check_lora_forward(problem_, kRows, kRank), "");
  for (const Buffer* spoiled : {&problem_.output(), &problem_.adapter().t}) {
    run(forward);
    spoil(*spoiled, GetParam());
    EXPECT_NE(check_lora_forward(problem_, kRows, kRank), "");
  }
  const Work backward = problem_.lora_backward(kRows, kRank);
  run(backward);
  EXPECT_EQ(check_lora_backward(problem_, kRows, kRank), "");
  const Adapter& adapter = problem_.adapter();
  for (const Buffer* spoiled : {&problem_.output(), &adapter.da, &adapter.db}) {
    run(backward);
    spoil(*spoiled, GetParam());
    EXPECT_NE(check_lora_backward(problem_, kRows, kRank), "");
  }
}

TEST_P(BenchSupport, ConversionsThereAndBackKeepRepresentableNumbers) {
  const float values[] = {0.0f, -1.5f, 0.25f, 1.0f, 248.0f};
  const std::vector<uint8_t> raw = encode(values, GetParam());
  Buffer buffer(*machine_, static_cast<int64_t>(raw.size()));
  std::memcpy(buffer.as(), raw.data(), raw.size());
  const HostArray array(buffer, std::ssize(values), GetParam());
  for (int64_t i = 0; i < std::ssize(values); ++i) EXPECT_EQ(array[i], values[i]);
}

INSTANTIATE_TEST_SUITE_P(DTypes, BenchSupport,
                         testing::Values(DType::kBFloat16, DType::kFloat16, DType::kFloat32),
                         [](const auto& info) { return std::string(short_name(info.param)); });

TEST(HalfUlp, IsThatOfTheFormat) {
  EXPECT_EQ(half_ulp(1.0, DType::kBFloat16), 1.0 / 256);
  EXPECT_EQ(half_ulp(1.0, DType::kFloat16), 1.0 / 2048);
  EXPECT_EQ(half_ulp(-3.0, DType::kFloat32), 2.0 / (1 << 24));
  EXPECT_EQ(half_ulp(1e-9, DType::kFloat16), half_ulp(0, DType::kFloat16));
}

/// {quantization, whether the scales are in 8 bits}
using Format = std::tuple<qlora_native::QuantType, int64_t, bool>;

class BenchFormats : public testing::TestWithParam<Format> {};

TEST_P(BenchFormats, EveryFormatIsCheckedAndAWrongScaleIsFound) {
  const auto [type, block_size, double_quant] = GetParam();
  const std::unique_ptr<Machine> machine = make_cpu_machine();
  // Blocks that straddle rows, and a short one in the end.
  Problem problem(*machine, {37, 50}, DType::kBFloat16, {type, block_size, double_quant});
  const auto run = [](const Work& work) {
    for (const auto& call : work.calls) call();
  };
  run(problem.quantize());
  EXPECT_EQ(check_quantized(problem), "");
  run(problem.dequantize());
  EXPECT_EQ(check_dequantized(problem), "");
  run(problem.matmul(kRows));
  EXPECT_EQ(check_matmul(problem, kRows), "");
  run(problem.matmul_transposed(kRows));
  EXPECT_EQ(check_matmul_transposed(problem, kRows), "");
  const QuantizedWeight& weight = problem.quantized();
  *(double_quant ? weight.offset : weight.absmax).as<float>() *= 1.5f;
  EXPECT_NE(check_quantized(problem), "");
  EXPECT_NE(check_matmul_transposed(problem, kRows), "");
}

INSTANTIATE_TEST_SUITE_P(Formats, BenchFormats,
                         testing::Combine(testing::Values(qlora_native::QuantType::kNF4,
                                                          qlora_native::QuantType::kFP4,
                                                          qlora_native::QuantType::kINT4),
                                          testing::Values<int64_t>(32, 256), testing::Bool()));

}  // namespace
}  // namespace bench
