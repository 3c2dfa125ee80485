// What the benchmark programs share: their checks can fail, their options are understood.
#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>
#include <string>
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

TEST(Options, AreTakenOutAndOthersAreLeft) {
  std::vector<std::string> arguments = {
      "--shapes=64x128,256x32", "--benchmark_filter=x", "--m=1,64",
      "--dtypes=fp16,fp32",     "--kernel=scalar",      "--devices=cpu"};
  const Options options = parse_options(arguments);
  EXPECT_EQ(options.shapes, (std::vector<Shape>{{64, 128}, {256, 32}}));
  EXPECT_EQ(options.rows, (std::vector<int64_t>{1, 64}));
  EXPECT_EQ(options.dtypes, (std::vector<DType>{DType::kFloat16, DType::kFloat32}));
  EXPECT_EQ(options.kernel, "scalar");
  EXPECT_EQ(options.devices, std::vector<std::string>{"cpu"});
  EXPECT_EQ(arguments, std::vector<std::string>{"--benchmark_filter=x"});
}

TEST(Options, SayWhatIsWrong) {
  for (const char* bad : {"--shapes=64", "--shapes=64x", "--m=0", "--m=", "--m", "--dtypes=int8",
                          "--devices=tpu", "--threads=many"}) {
    std::vector<std::string> arguments = {bad};
    try {
      parse_options(arguments);
      ADD_FAILURE() << bad << " was accepted";
    } catch (const std::invalid_argument& error) {
      const std::string option = std::string(bad).substr(0, std::string(bad).find('='));
      EXPECT_NE(std::string(error.what()).find(option), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace bench
