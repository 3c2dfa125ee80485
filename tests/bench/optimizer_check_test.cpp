// The check of optimizer steps passes what is right, and finds what is not.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <tuple>

#include "cpp/machine.h"
#include "cpp/optimizer_problem.h"
#include "cpp/options.h"
#include "cpp/verify_optimizer.h"

namespace bench {
namespace {

using qlora_native::DType;

class BenchOptimizers : public testing::TestWithParam<std::tuple<std::string, DType>> {
 protected:
  OptimizerKind kind() const { return optimizer_kind_of(std::get<0>(GetParam())); }

  std::unique_ptr<Machine> machine_ = make_cpu_machine();
  OptimizerProblem problem_{*machine_, tensor_sizes_of("tiny"), std::get<1>(GetParam()), kind()};
};

TEST_P(BenchOptimizers, StepsAreCheckedAndWrongResultsAreFound) {
  for (int i = 0; i < 3; ++i) {
    const StepCheck check(problem_);
    EXPECT_NE(check.compare(), "") << "no step was taken";
    problem_.step();
    EXPECT_EQ(check.compare(), "");
  }
  const StepCheck check(problem_);
  problem_.step();
  for (const qlora_native::OptimizerTensor& tensor : problem_.tensors()) {
    // The last byte of a parameter has its exponent; that of a moment is in one way or another large.
    auto* const parameter = static_cast<uint8_t*>(tensor.param) + size_bytes(problem_.dtype()) - 1;
    auto* const moment = static_cast<uint8_t*>(tensor.state1) + (kind().is_8bit() ? 0 : 3);
    for (uint8_t* const byte : {parameter, moment}) {
      *byte ^= 0xC0;
      EXPECT_NE(check.compare(), "");
      *byte ^= 0xC0;
      EXPECT_EQ(check.compare(), "");
    }
    if (kind().is_8bit()) {
      *tensor.absmax1 *= 1.25f;
      EXPECT_NE(check.compare(), "");
      *tensor.absmax1 /= 1.25f;
    }
    *tensor.step += 1;
    EXPECT_NE(check.compare(), "");
    *tensor.step -= 1;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, BenchOptimizers,
                         testing::Combine(testing::Values("adamw", "adamw8bit", "lion", "lion8bit"),
                                          testing::Values(DType::kFloat32, DType::kBFloat16,
                                                          DType::kFloat16)),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" +
                                  short_name(std::get<1>(info.param));
                         });

TEST(BenchOptimizerCases, AreWhatTheHelpSays) {
  const TensorSizes lora = tensor_sizes_of("lora");
  EXPECT_EQ(lora.size(), 112u);
  int64_t elements = 0;
  for (const int64_t size : lora) elements += size;
  EXPECT_EQ(elements, 10'485'760);
  EXPECT_EQ(bytes_per_element(optimizer_kind_of("adamw"), DType::kFloat32), 28);
  EXPECT_EQ(bytes_per_element(optimizer_kind_of("lion"), DType::kFloat32), 20);
  EXPECT_NEAR(bytes_per_element(optimizer_kind_of("adamw8bit"), DType::kFloat32), 16.06, 0.01);
}

}  // namespace
}  // namespace bench
