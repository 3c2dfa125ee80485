// The adapters' operations against fp64, and the passes composed of them.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/kernel_runs.h"
#include "support/lora_model.h"
#include "support/problem.h"

namespace qlora_native::testing {
namespace {

constexpr Op kOps[] = {Op::kLoraProject, Op::kLoraUpdate, Op::kLoraGradient};

void expect_near(const std::vector<double>& actual, const LoraReference& expected, DType dtype) {
  ASSERT_EQ(actual.size(), expected.exact.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    const double bound =
        std::fabs(expected.exact[i]) * unit_roundoff(dtype) * 1.01 + expected.tolerance[i];
    ASSERT_NEAR(actual[i], expected.exact[i], bound) << "element " << i;
  }
}

void expect_every_kernel_accurate(const LoraProblem& p, uint32_t seed) {
  SCOPED_TRACE(::testing::Message() << p);
  const LoraInputs inputs = make_inputs(p, seed);
  const LoraReference expected = reference(p, inputs);
  for (const Device device : test_devices()) {
    for_each_kernel(p.op, device,
                    [&] { expect_near(run_on(device, p, inputs), expected, p.out_dtype()); });
  }
}

class Lora : public ::testing::TestWithParam<Op> {};

INSTANTIATE_TEST_SUITE_P(EveryOperation, Lora, ::testing::ValuesIn(kOps),
                         [](const auto& info) { return std::string(name(info.param)); });

TEST_P(Lora, EveryShape) {
  uint32_t seed = 10;
  const int64_t shapes[][3] = {{1, 1, 1},    {1, 8, 64},    {2, 7, 3},    {3, 16, 257},
                               {5, 17, 31},  {33, 32, 96},  {64, 64, 64}, {65, 33, 130},
                               {1, 300, 40}, {40, 300, 72}, {300, 4, 19}, {17, 129, 515}};
  for (const auto& [m, r, c] : shapes) {
    for (const bool transposed : {false, true}) {
      LoraProblem p{GetParam(), m, r, c};
      p.transposed = transposed;
      p.dtype = kAllDTypes[seed % 3];
      p.parameter_dtype = seed % 2 == 0 ? p.dtype : DType::kFloat32;
      p.dropout = {seed % 4 < 2 ? 0.0f : 0.3f, seed, uint64_t{seed} << 33};
      expect_every_kernel_accurate(p, ++seed);
    }
  }
}

TEST_P(Lora, EveryRank) {
  for (int64_t r = 1; r <= 300; r += r < 20 ? 1 : 23) {
    LoraProblem p{GetParam(), 19, r, 72};
    p.dtype = kAllDTypes[r % 3];
    p.transposed = r % 2 == 0;
    p.parameter_dtype = DType::kFloat32;
    p.dropout = {0.1f, 7, 9};
    expect_every_kernel_accurate(p, static_cast<uint32_t>(r));
  }
}

TEST_P(Lora, EveryDtype) {
  uint32_t seed = 200;
  for (const DType dtype : kAllDTypes) {
    for (const DType parameters : {dtype, DType::kFloat32}) {
      for (const bool transposed : {false, true}) {
        LoraProblem p{GetParam(), 21, 16, 264};
        p.dtype = dtype;
        p.parameter_dtype = parameters;
        p.transposed = transposed;
        p.dropout = {0.5f, 1, 2};
        expect_every_kernel_accurate(p, ++seed);
      }
    }
  }
}

TEST_P(Lora, ManyRowsAndADeepMatrix) {
  for (const auto& [m, c] : {std::array<int64_t, 2>{700, 80}, std::array<int64_t, 2>{9, 4160}}) {
    LoraProblem p{GetParam(), m, 16, c};
    p.dtype = DType::kBFloat16;
    p.parameter_dtype = DType::kFloat32;
    p.dropout = {0.05f, 3, 4};
    expect_every_kernel_accurate(p, 300);
  }
}

TEST_P(Lora, StridedRows) {
  uint32_t seed = 400;
  for (const bool transposed : {false, true}) {
    for (const DType dtype : kAllDTypes) {
      LoraProblem p{GetParam(), 13, 24, 72};
      p.dtype = dtype;
      p.parameter_dtype = DType::kFloat32;
      p.transposed = transposed;
      p.low_padding = 5;
      p.high_padding = 11;
      p.parameter_padding = 3;
      p.dropout = {0.25f, 5, 6};
      expect_every_kernel_accurate(p, ++seed);
    }
  }
}

TEST_P(Lora, NothingToDo) {
  uint32_t seed = 500;
  for (const auto& [m, r, c] : {std::array<int64_t, 3>{0, 8, 64}, std::array<int64_t, 3>{4, 0, 64},
                                std::array<int64_t, 3>{4, 8, 0}}) {
    for (const DType dtype : kAllDTypes) {
      for (const bool transposed : {false, true}) {
        LoraProblem p{GetParam(), m, r, c};
        p.dtype = dtype;
        p.parameter_dtype = DType::kFloat32;
        p.transposed = transposed;
        p.dropout = {0.5f, 1, 1};
        const LoraInputs inputs = make_inputs(p, ++seed);
        for (const Device device : test_devices()) {
          // An empty sum is zero, and what is added to stays as it was.
          EXPECT_EQ(run_on(device, p, inputs), reference(p, inputs).exact);
        }
      }
    }
  }
}

TEST_P(Lora, ANanGoesWhereItIsUsedAndNotWhereItIsDropped) {
  for (const DType dtype : kAllDTypes) {
    LoraProblem p{GetParam(), 37, 16, 136};
    p.dtype = p.parameter_dtype = dtype;
    p.dropout = {0.5f, 11, 12};
    LoraInputs inputs = make_inputs(p, 600);
    // Of x, v, or what y is before, at a place that is kept and at one that is not.
    for (const bool is_kept_place : {false, true}) {
      const int64_t row = is_kept_place ? 5 : 30;
      int64_t col = 60;
      while (is_kept(p.dropout, p.c, row, col) != is_kept_place) ++col;
      inputs.high[static_cast<size_t>(row * p.c + col)] = std::numeric_limits<double>::quiet_NaN();
    }
    const LoraReference expected = reference(p, inputs);
    for (const Device device : test_devices()) {
      for_each_kernel(p.op, device, [&] {
        const std::vector<double> actual = run_on(device, p, inputs);
        for (size_t i = 0; i < actual.size(); ++i) {
          ASSERT_EQ(std::isnan(actual[i]), std::isnan(expected.exact[i])) << i;
        }
      });
    }
  }
}

TEST_P(Lora, ANanOfTheAdapterGoesWhereItIsUsed) {
  LoraProblem p{GetParam(), 37, 16, 136};
  p.dtype = DType::kBFloat16;
  p.parameter_dtype = DType::kFloat32;
  LoraInputs inputs = make_inputs(p, 610);
  std::vector<double>& hit = p.op == Op::kLoraGradient ? inputs.low : inputs.factor;
  hit[21] = std::numeric_limits<double>::quiet_NaN();
  const LoraReference expected = reference(p, inputs);
  for (const Device device : test_devices()) {
    for_each_kernel(p.op, device, [&] {
      const std::vector<double> actual = run_on(device, p, inputs);
      for (size_t i = 0; i < actual.size(); ++i) {
        ASSERT_EQ(std::isnan(actual[i]), std::isnan(expected.exact[i])) << i;
      }
    });
  }
}

TEST_P(Lora, RepeatsItsBitsWithEveryNumberOfThreads) {
  LoraProblem p{GetParam(), 130, 40, 1000};
  p.dtype = DType::kBFloat16;
  p.parameter_dtype = DType::kFloat32;
  p.dropout = {0.1f, 1, 2};
  const LoraInputs inputs = make_inputs(p, 700);
  for_each_kernel(p.op, Device::cpu(), [&] {
    const int threads_before = cpu_threads();
    set_cpu_threads(1);
    const std::vector<double> expected = run_on(Device::cpu(), p, inputs);
    for (const int threads : {2, 5}) {
      set_cpu_threads(threads);
      EXPECT_EQ(run_on(Device::cpu(), p, inputs), expected) << threads << " threads";
    }
    set_cpu_threads(threads_before);
  });
}

TEST_P(Lora, DropsTheSameElementsInEveryOperation) {
  for (const float probability : {0.01f, 0.5f, 1.0f}) {
    LoraProblem p{GetParam(), 24, 83, 83};
    if (p.is_gradient()) p.r = p.m;
    p.scaling = 1.0f;
    p.dropout = {probability, 0x123456789abcdef0u, 0xfedcba9876543210u};
    const LoraInputs inputs = identity_inputs(p);
    std::vector<double> expected = reference(p, inputs).exact;
    for (double& value : expected) value = round_to(DType::kFloat32, value);
    for (const Device device : test_devices()) {
      for_each_kernel(p.op, device, [&] { EXPECT_EQ(run_on(device, p, inputs), expected); });
    }
  }
}

}  // namespace
}  // namespace qlora_native::testing
