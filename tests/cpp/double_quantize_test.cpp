// The second level: offset, absmax2 and the 8-bit codes, byte for byte against the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/kernel_runs.h"
#include "support/number_formats.h"
#include "support/problem.h"

namespace qlora_native::testing {
namespace {

void expect_matches_reference(const WeightSpec& spec, const std::vector<double>& values,
                              const float* pinned_offset = nullptr) {
  SCOPED_TRACE(::testing::Message() << spec);
  const HostWeight expected = reference_quantize(spec, values, pinned_offset);
  for (const Device device : test_devices()) {
    for_each_kernel(Op::kQuantize4bit, device, [&] {
      expect_same_bytes(quantize_on(device, spec, DType::kFloat32, values, pinned_offset),
                        expected);
    });
  }
}

TEST(DoubleQuantize, MatchesTheReference) {
  uint32_t seed = 10;
  // One block; a group less one, exactly one, one more; several groups and an odd end.
  for (const int64_t blocks : {1, 255, 256, 257, 1000}) {
    const WeightSpec spec{blocks, 32, 32, kNF4, true};
    expect_matches_reference(spec, gaussian(spec.numel(), DType::kFloat32, ++seed, 0.02));
  }
  const WeightSpec ragged{33, 1001, 64, kFP4, true};
  expect_matches_reference(ragged, gaussian(ragged.numel(), DType::kFloat32, ++seed));
}

TEST(DoubleQuantize, GroupsOfEveryBlockSize) {
  uint32_t seed = 30;
  for (int64_t block_size = kMinBlockSize; block_size <= kMaxBlockSize; block_size *= 2) {
    // Two groups, a piece of a third, and a short block at its end.
    const WeightSpec spec{1, 525 * block_size + 7, block_size, kNF4, true};
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      SCOPED_TRACE(::testing::Message() << spec << ", " << name(dtype));
      const std::vector<double> values = gaussian(spec.numel(), dtype, ++seed);
      const HostWeight expected = reference_quantize(spec, values);
      for (const Device device : test_devices()) {
        for_each_kernel(Op::kQuantize4bit, device, [&] {
          expect_same_bytes(quantize_on(device, spec, dtype, values), expected);
        });
      }
    }
  }
}

TEST(DoubleQuantize, MoreGroupsThanLanes) {
  // The second stage of the sum has 1024 lanes; 1100 groups make it go round.
  const WeightSpec spec{1100 * 256, 32, 32, kINT4, true};
  std::vector<double> values(static_cast<size_t>(spec.numel()), 0.0);
  const std::vector<double> scales = gaussian(spec.blocks(), DType::kFloat32, 11);
  for (size_t b = 0; b < scales.size(); ++b) values[b * 32 + b % 32] = scales[b];
  expect_matches_reference(spec, values);
}

TEST(DoubleQuantize, TheOffsetIsTheMean) {
  const WeightSpec spec{64, 1024, 64, kNF4, true};
  const std::vector<double> values = gaussian(spec.numel(), DType::kFloat32, 12);
  const WeightSpec plain{64, 1024, 64, kNF4, false};
  for (const Device device : test_devices()) {
    long double sum = 0;
    for (const float a : quantize_on(device, plain, DType::kFloat32, values).absmax) sum += a;
    const double mean = static_cast<double>(sum / spec.blocks());
    const float offset = quantize_on(device, spec, DType::kFloat32, values).offset[0];
    EXPECT_NEAR(offset, mean, mean * 1e-7);
  }
}

TEST(DoubleQuantize, HonoursAPinnedOffset) {
  const WeightSpec spec{9, 2048, 64, kNF4, true};
  const std::vector<double> values = gaussian(spec.numel(), DType::kFloat32, 13);
  for (const float offset : {0.0f, 2.5f, -1.0f, 1e-40f})
    expect_matches_reference(spec, values, &offset);
}

TEST(DoubleQuantize, ANanBlockPoisonsItsGroupAndNotTheOffset) {
  const WeightSpec spec{600, 32, 32, kNF4, true};
  std::vector<double> values = gaussian(spec.numel(), DType::kFloat32, 14);
  values[300 * 32 + 7] = std::numeric_limits<double>::quiet_NaN();
  expect_matches_reference(spec, values);
  for (const Device device : test_devices()) {
    const HostWeight weight = quantize_on(device, spec, DType::kFloat32, values);
    EXPECT_TRUE(std::isfinite(weight.offset[0]));
    EXPECT_TRUE(std::isfinite(weight.absmax2[0]));
    EXPECT_TRUE(std::isnan(weight.absmax2[1]));
    EXPECT_TRUE(std::isfinite(weight.absmax2[2]));
  }
}

TEST(DoubleQuantize, AllNanGivesOffsetZero) {
  const WeightSpec spec{2, 32, 32, kNF4, true};
  expect_matches_reference(spec, std::vector<double>(64, std::numeric_limits<double>::infinity()));
}

TEST(DoubleQuantize, EqualScalesGiveAFlatGroup) {
  const WeightSpec spec{300, 32, 32, kNF4, true};
  std::vector<double> values(static_cast<size_t>(spec.numel()), 0.0);
  for (size_t b = 0; b < 300; ++b) values[b * 32] = -0.75;
  expect_matches_reference(spec, values);
  expect_matches_reference(spec, std::vector<double>(values.size(), 0.0));
}

TEST(DoubleQuantize, TheNumberOfThreadsDoesNotChangeAByte) {
  const WeightSpec spec{1030, 1000, 32, kNF4, true};
  const std::vector<double> values = gaussian(spec.numel(), DType::kFloat32, 15);
  const int threads_before = cpu_threads();
  set_cpu_threads(1);
  const HostWeight expected = quantize_on(Device::cpu(), spec, DType::kFloat32, values);
  for (const int threads : {2, 3, 7}) {
    set_cpu_threads(threads);
    expect_same_bytes(quantize_on(Device::cpu(), spec, DType::kFloat32, values), expected);
  }
  set_cpu_threads(threads_before);
}

}  // namespace
}  // namespace qlora_native::testing
