// quantize_4bit without double quantization, byte for byte against the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/kernel_runs.h"
#include "support/number_formats.h"
#include "support/problem.h"

namespace qlora_native::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
const Codebook kAllCodebooks[] = {kNF4, kFP4, kINT4, uneven_codebook()};

void expect_matches_reference(const WeightSpec& spec, DType dtype,
                              const std::vector<double>& values) {
  SCOPED_TRACE(::testing::Message() << spec << ", " << name(dtype));
  const HostWeight expected = reference_quantize(spec, values);
  for (const Device device : test_devices()) {
    for_each_kernel(Op::kQuantize4bit, device,
                    [&] { expect_same_bytes(quantize_on(device, spec, dtype, values), expected); });
  }
}

TEST(Quantize, MatchesTheReferenceForEveryBlockSizeTypeAndDtype) {
  uint32_t seed = 0;
  for (int64_t block_size = kMinBlockSize; block_size <= kMaxBlockSize; block_size *= 2) {
    for (const Codebook& book : kAllCodebooks) {
      for (const DType dtype : kAllDTypes) {
        // Two whole blocks and an odd piece of a third.
        const WeightSpec spec{1, 2 * block_size + 13, block_size, book, false};
        expect_matches_reference(spec, dtype, gaussian(spec.numel(), dtype, ++seed, 0.02));
      }
    }
  }
}

TEST(Quantize, TakesRaggedShapes) {
  const int64_t shapes[][2] = {{1, 1},  {1, 2},   {3, 1},   {7, 31},
                               {5, 33}, {63, 65}, {37, 99}, {17, 1031}};
  uint32_t seed = 100;
  for (const auto& [rows, cols] : shapes) {
    for (const DType dtype : kAllDTypes) {
      const WeightSpec spec{rows, cols, 64, kNF4, false};
      expect_matches_reference(spec, dtype, gaussian(spec.numel(), dtype, ++seed));
    }
  }
}

TEST(Quantize, SplitsLargeInputsOverThreadsWithoutATrace) {
  const WeightSpec spec{517, 1023, 64, kNF4, false};
  expect_matches_reference(spec, DType::kBFloat16, gaussian(spec.numel(), DType::kBFloat16, 5));
}

TEST(Quantize, ZeroBlocksGetZeroCodesAndNoScale) {
  for (const Codebook& book : kAllCodebooks) {
    const WeightSpec spec{1, 64 * 3 + 5, 64, book, false};
    std::vector<double> values = gaussian(spec.numel(), DType::kFloat32, 1);
    std::fill(values.begin() + 64, values.begin() + 128, -0.0);
    std::fill(values.begin() + 192, values.end(), 0.0);
    expect_matches_reference(spec, DType::kFloat32, values);
  }
}

TEST(Quantize, TheOddTailsLowNibbleIsZero) {
  for (const Codebook& book : kAllCodebooks) {
    const WeightSpec spec{1, 65, 64, book, false};
    const std::vector<double> values = gaussian(spec.numel(), DType::kFloat32, 2);
    for (const Device device : test_devices()) {
      for_each_kernel(Op::kQuantize4bit, device, [&] {
        const HostWeight weight = quantize_on(device, spec, DType::kFloat32, values);
        EXPECT_EQ(second_nibble(weight.packed.back()), encode_4bit(book, 0.0f));
      });
    }
  }
}

TEST(Quantize, TiesOnDecisionPointsGoDown) {
  for (const Codebook& book : kAllCodebooks) {
    // absmax is 1, so the scaled values are the values; each point and its two neighbours.
    std::vector<double> values = {1.0};
    for (const float point : book.decision_points) {
      values.insert(values.end(),
                    {point, std::nextafter(point, -2.0f), std::nextafter(point, 2.0f)});
    }
    values.insert(values.end(), {-1.0, -0.0, 0.0});
    values.resize(64, 0.0);
    expect_matches_reference({1, 64, 64, book, false}, DType::kFloat32, values);
  }
}

TEST(Quantize, TiesAreDecidedAfterScalingInFp32) {
  // x * (1 / absmax) and x / absmax round differently for such scales.
  for (const Codebook& book : kAllCodebooks) {
    for (const float absmax : {3.0f, 0.7f, 1.1754944e-38f, 3e38f, 49.0f}) {
      std::vector<double> values = {absmax};
      for (const float point : book.decision_points) {
        const float x = point * absmax;
        values.insert(values.end(), {x, std::nextafter(x, -absmax), std::nextafter(x, absmax)});
      }
      values.resize(64, 0.0);
      expect_matches_reference({1, 64, 64, book, false}, DType::kFloat32, values);
    }
  }
}

TEST(Quantize, NanAndInfinityPoisonTheirBlockOnly) {
  for (const DType dtype : kAllDTypes) {
    for (const double bad : {kNan, kInfinity, -kInfinity}) {
      for (const size_t position : {0u, 63u, 64u, 100u, 160u, 170u}) {
        const WeightSpec spec{1, 171, 64, kNF4, false};
        std::vector<double> values = gaussian(spec.numel(), dtype, 3);
        values[position] = bad;
        expect_matches_reference(spec, dtype, values);
      }
    }
  }
}

TEST(Quantize, SubnormalsAndExtremes) {
  for (const DType dtype : kAllDTypes) {
    for (const double scale : {1e-45, 3e-39, 5.9e-39, 1.2e-38, 6e-8, 6e-5, 60000.0, 3.3e38}) {
      const WeightSpec spec{1, 131, 64, kNF4, false};
      std::vector<double> values = gaussian(spec.numel(), dtype, 4);
      for (double& value : values) value = round_to(dtype, std::tanh(value) * scale);
      expect_matches_reference(spec, dtype, values);
    }
  }
}

TEST(Quantize, TakesArraysAtAnyAddress) {
  for (const DType dtype : kAllDTypes) {
    const WeightSpec spec{3, 1111, 64, kNF4, false};
    const std::vector<double> values = gaussian(spec.numel(), dtype, 6);
    const HostWeight expected = reference_quantize(spec, values);
    // An element behind a wide access's boundary, and a byte.
    const int64_t input_shift = size_bytes(dtype);
    const int64_t packed_shift = 1;
    std::vector<uint8_t> bytes = to_bytes(dtype, values);
    bytes.insert(bytes.begin(), static_cast<size_t>(input_shift), 0xff);
    for (const Device device : test_devices()) {
      for_each_kernel(Op::kQuantize4bit, device, [&] {
        DeviceArray<uint8_t> input(device, std::span<const uint8_t>(bytes));
        DeviceArray<uint8_t> packed(device, packed_bytes(spec.numel()) + packed_shift);
        DeviceArray<float> absmax(device, spec.blocks());
        QuantizeArgs args;
        args.input = {input.data() + input_shift, spec.numel(), dtype, device};
        args.output.packed = packed.data() + packed_shift;
        args.output.absmax.values = absmax.data();
        args.output.rows = spec.rows;
        args.output.cols = spec.cols;
        args.output.block_size = spec.block_size;
        args.output.codebook = spec.codebook;
        args.output.device = device;
        const TestStream stream(device);
        quantize_4bit(args, {}, stream.get());
        stream.synchronize();
        packed.expect_guards_intact();
        std::vector<uint8_t> codes = packed.to_host();
        codes.erase(codes.begin(), codes.begin() + packed_shift);
        EXPECT_EQ(codes, expected.packed) << name(dtype);
        EXPECT_EQ(absmax.to_host(), expected.absmax) << name(dtype);
      });
    }
  }
}

TEST(Quantize, EmptyInputsWriteNothing) {
  for (const Device device : test_devices()) {
    for (const bool double_quant : {false, true}) {
      const WeightSpec spec{0, 64, 64, kNF4, double_quant};
      DeviceWeight output(device, spec);
      QuantizeArgs args;
      args.input = {nullptr, 0, DType::kFloat32, device};
      args.output = output.mutable_view();
      EXPECT_EQ(quantize_4bit_workspace_bytes(args), 0);
      const TestStream stream(device);
      quantize_4bit(args, {}, stream.get());
      stream.synchronize();
      EXPECT_TRUE(output.is_untouched());
    }
  }
}

}  // namespace
}  // namespace qlora_native::testing
