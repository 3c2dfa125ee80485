// dequantize_4bit: the fp32 product of code and scale, rounded once, bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/kernel_runs.h"
#include "support/number_formats.h"
#include "support/problem.h"

namespace qlora_native::testing {
namespace {

const Codebook kAllCodebooks[] = {kNF4, kFP4, kINT4, uneven_codebook()};

void expect_matches_reference(const WeightSpec& spec, const HostWeight& weight) {
  const std::vector<double> decoded = reference_decode(spec, weight);
  for (const DType dtype : kAllDTypes) {
    SCOPED_TRACE(::testing::Message() << spec << ", " << name(dtype));
    const std::vector<uint8_t> expected = to_bytes(dtype, decoded);
    for (const Device device : test_devices()) {
      for_each_kernel(Op::kDequantize4bit, device, [&] {
        const std::vector<uint8_t> actual = dequantize_on(device, spec, weight, dtype);
        ASSERT_EQ(actual.size(), expected.size());
        const std::vector<double> actual_values = from_bytes(dtype, actual);
        const std::vector<double> expected_values = from_bytes(dtype, expected);
        const auto width = static_cast<size_t>(size_bytes(dtype));
        for (size_t i = 0; i < actual.size(); ++i) {
          const size_t element = i / width;
          // A NaN is a NaN: which one a product gives is the processor's choice.
          if (std::isnan(actual_values[element]) && std::isnan(expected_values[element])) continue;
          ASSERT_EQ(actual[i], expected[i])
              << "element " << element << " is " << actual_values[element] << ", expected "
              << expected_values[element];
        }
      });
    }
  }
}

TEST(Dequantize, MatchesTheReferenceForEveryBlockSizeAndType) {
  uint32_t seed = 20;
  for (int64_t block_size = kMinBlockSize; block_size <= kMaxBlockSize; block_size *= 2) {
    for (const Codebook& book : kAllCodebooks) {
      for (const bool double_quant : {false, true}) {
        const WeightSpec spec{1, 2 * block_size + 13, block_size, book, double_quant};
        expect_matches_reference(spec, random_weight(spec, ++seed));
      }
    }
  }
}

TEST(Dequantize, TakesRaggedShapes) {
  const int64_t shapes[][2] = {{1, 1},  {1, 2},   {3, 1},   {7, 31},
                               {5, 33}, {63, 65}, {37, 99}, {300, 331}};
  uint32_t seed = 40;
  for (const auto& [rows, cols] : shapes) {
    for (const bool double_quant : {false, true}) {
      const WeightSpec spec{rows, cols, 64, kNF4, double_quant};
      expect_matches_reference(spec, random_weight(spec, ++seed));
    }
  }
}

TEST(Dequantize, DecodesWhatBeganAsNan) {
  const WeightSpec spec{3, 64, 64, kNF4, false};
  HostWeight weight = random_weight(spec, 50);
  weight.absmax[1] = __builtin_bit_cast(float, 0x7fc00000u);
  expect_matches_reference(spec, weight);
}

TEST(Dequantize, ScalesAtTheEdgesOfTheFormats) {
  // Halves overflow above 65504 and are subnormal below 6.1e-5; floats end at 3.4e38 and 1e-45.
  const float scales[] = {0.0f,  1e-45f,   1e-38f,   6e-8f,    3e-8f,
                          6e-5f, 65504.0f, 65519.0f, 65520.0f, 3.4e38f};
  const auto blocks = static_cast<int64_t>(std::size(scales));
  const WeightSpec spec{blocks, 32, 32, kNF4, false};
  HostWeight weight = random_weight(spec, 51);
  weight.absmax.assign(std::begin(scales), std::end(scales));
  expect_matches_reference(spec, weight);
}

TEST(Dequantize, TheScaleIsTwoRoundedOperations) {
  // A fused multiply-add would give other bits for about half of these.
  const WeightSpec spec{512, 32, 32, kINT4, true};
  HostWeight weight = random_weight(spec, 52);
  weight.offset[0] = 1.0f / 3;
  expect_matches_reference(spec, weight);
}

TEST(Dequantize, RoundTripStaysWithinHalfAStep) {
  const WeightSpec spec{16, 200, 64, kINT4, false};
  const std::vector<double> values = gaussian(spec.numel(), DType::kFloat32, 53);
  for (const Device device : test_devices()) {
    const HostWeight weight = quantize_on(device, spec, DType::kFloat32, values);
    const auto decoded =
        from_bytes(DType::kFloat32, dequantize_on(device, spec, weight, DType::kFloat32));
    for (size_t i = 0; i < values.size(); ++i) {
      EXPECT_NEAR(decoded[i], values[i], weight.absmax[i / 64] / 14 * 1.00001) << i;
    }
  }
}

TEST(Dequantize, TakesArraysAtAnyAddress) {
  const WeightSpec spec{3, 1111, 64, kNF4, false};
  const HostWeight weight = random_weight(spec, 54);
  const std::vector<double> decoded = reference_decode(spec, weight);
  std::vector<uint8_t> codes = weight.packed;
  codes.insert(codes.begin(), 1, 0xff);
  for (const DType dtype : kAllDTypes) {
    const std::vector<double> expected = from_bytes(dtype, to_bytes(dtype, decoded));
    const int64_t shift = size_bytes(dtype);
    for (const Device device : test_devices()) {
      for_each_kernel(Op::kDequantize4bit, device, [&] {
        DeviceArray<uint8_t> packed(device, std::span<const uint8_t>(codes));
        DeviceArray<float> absmax(device, std::span<const float>(weight.absmax));
        DeviceArray<uint8_t> output(device, spec.numel() * size_bytes(dtype) + shift);
        QuantizedView view;
        view.packed = packed.data() + 1;
        view.absmax.values = absmax.data();
        view.rows = spec.rows;
        view.cols = spec.cols;
        view.block_size = spec.block_size;
        view.codebook = spec.codebook;
        view.device = device;
        const TestStream stream(device);
        dequantize_4bit({view, {output.data() + shift, spec.numel(), dtype, device}}, stream.get());
        stream.synchronize();
        output.expect_guards_intact();
        std::vector<uint8_t> bytes = output.to_host();
        bytes.erase(bytes.begin(), bytes.begin() + shift);
        const std::vector<double> actual = from_bytes(dtype, bytes);
        for (size_t i = 0; i < expected.size(); ++i) {
          if (std::isnan(expected[i])) {
            ASSERT_TRUE(std::isnan(actual[i])) << i;
          } else {
            ASSERT_EQ(actual[i], expected[i]) << name(dtype) << ", element " << i;
          }
        }
      });
    }
  }
}

TEST(Dequantize, EmptyWeightsWriteNothing) {
  for (const Device device : test_devices()) {
    const WeightSpec spec{64, 0, 64, kNF4, false};
    EXPECT_TRUE(dequantize_on(device, spec, {}, DType::kFloat32).empty());
  }
}

}  // namespace
}  // namespace qlora_native::testing
