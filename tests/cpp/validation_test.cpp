// Wrong arguments: the message holds the values, and no output is touched.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "support/kernel_runs.h"
#include "support/problem.h"
#include "support/rejection.h"

namespace qlora_native::testing {
namespace {

class Validation : public ::testing::Test {
 protected:
  static constexpr int64_t kRows = 6;
  static constexpr int64_t kCols = 64;
  const WeightSpec plain_{kRows, kCols, 64, kNF4, false};
  const WeightSpec nested_{kRows, kCols, 64, kNF4, true};
};

class QuantizeValidation : public Validation {
 protected:
  using Change = std::function<void(QuantizeArgs&)>;
  void rejects(const WeightSpec& spec, const Change& change,
               const std::vector<std::string>& words) {
    for (const Device device : test_devices()) {
      DeviceArray<float> input(device, spec.numel());
      DeviceWeight output(device, spec);
      DeviceArray<uint8_t> workspace(device, 1 << 16);
      QuantizeArgs args;
      args.input = {input.data(), spec.numel(), DType::kFloat32, device};
      args.output = output.mutable_view();
      change(args);
      expect_rejected(
          [&] {
            quantize_4bit(args, {workspace.data(), workspace.size()}, TestStream(device).get());
          },
          words);
      EXPECT_TRUE(output.is_untouched());
    }
  }
};

TEST_F(QuantizeValidation, Shapes) {
  rejects(plain_, [](auto& a) { a.input.size = 383; }, {"quantize_4bit", "383", "384"});
  rejects(plain_, [](auto& a) { a.output.rows = -1; }, {"-1", "64"});
  rejects(plain_, [](auto& a) { a.output.rows = a.output.cols = int64_t{1} << 33; },
          {"8589934592"});
  rejects(plain_, [](auto& a) { a.output.block_size = 48; }, {"block_size", "48", "32", "4096"});
  rejects(plain_, [](auto& a) { a.output.block_size = 0; }, {"block_size 0"});
  rejects(plain_, [](auto& a) { a.output.block_size = 8192; }, {"8192"});
}

TEST_F(QuantizeValidation, Pointers) {
  rejects(plain_, [](auto& a) { a.input.data = nullptr; }, {"input", "null", "384"});
  rejects(plain_, [](auto& a) { a.output.packed = nullptr; }, {"packed", "null"});
  rejects(plain_, [](auto& a) { a.output.absmax.values = nullptr; }, {"absmax", "null", "6"});
  rejects(nested_, [](auto& a) { a.output.absmax.absmax2 = nullptr; }, {"absmax2", "null"});
  rejects(nested_, [](auto& a) { a.output.absmax.offset = nullptr; }, {"offset", "null"});
  float unused = 0;
  rejects(nested_, [&](auto& a) { a.output.absmax.values = &unused; }, {"absmax", "fp32", "8-bit"});
  rejects(plain_, [&](auto& a) { a.pinned_offset = &unused; }, {"offset", "double quantization"});
}

TEST_F(QuantizeValidation, Types) {
  rejects(plain_, [](auto& a) { a.input.dtype = static_cast<DType>(7); }, {"dtype", "7"});
  rejects(plain_, [](auto& a) { a.output.codebook.type = static_cast<QuantType>(9); },
          {"quant_type", "9"});
  rejects(plain_, [](auto& a) { a.input.device = Device::cuda(5); }, {"cuda:5"});
}

TEST_F(QuantizeValidation, CustomCodebooks) {
  rejects(plain_,
          [](auto& a) {
            a.output.codebook = uneven_codebook();
            a.output.codebook.values[3] = std::numeric_limits<float>::infinity();
          },
          {"codebook value 3", "inf"});
  rejects(plain_,
          [](auto& a) {
            a.output.codebook = uneven_codebook();
            a.output.codebook.values[5] = a.output.codebook.values[4];
          },
          {"ascend", "value 4", "value 5", "-0.31"});
}

TEST_F(QuantizeValidation, Workspace) {
  for (const Device device : test_devices()) {
    DeviceArray<float> input(device, nested_.numel());
    DeviceWeight output(device, nested_);
    QuantizeArgs args;
    args.input = {input.data(), nested_.numel(), DType::kFloat32, device};
    args.output = output.mutable_view();
    const int64_t needed = quantize_4bit_workspace_bytes(args);
    if (needed == 0) continue;
    DeviceArray<uint8_t> workspace(device, needed);
    const auto with = [&](Workspace w) {
      return [&, w] { quantize_4bit(args, w, TestStream(device).get()); };
    };
    expect_rejected(with({workspace.data(), needed - 1}),
                    {"workspace", std::to_string(needed - 1), std::to_string(needed)});
    expect_rejected(with({nullptr, needed}), {"workspace"});
    EXPECT_TRUE(output.is_untouched());
  }
}

TEST_F(Validation, Dequantize) {
  for (const Device device : test_devices()) {
    DeviceWeight weight(device, plain_, random_weight(plain_, 1));
    DeviceArray<float> output(device, plain_.numel());
    const auto rejects = [&](const std::function<void(DequantizeArgs&)>& change,
                             const std::vector<std::string>& words) {
      DequantizeArgs args{weight.view(), {output.data(), plain_.numel(), DType::kFloat32, device}};
      change(args);
      expect_rejected([&] { dequantize_4bit(args, TestStream(device).get()); }, words);
      EXPECT_TRUE(output.is_untouched());
    };
    rejects([](auto& a) { a.output.size = 385; }, {"dequantize_4bit", "385", "384"});
    rejects([](auto& a) { a.output.data = nullptr; }, {"output", "null"});
    rejects([](auto& a) { a.output.dtype = static_cast<DType>(-1); }, {"dtype", "-1"});
    rejects([](auto& a) { a.weight.block_size = 65; }, {"block_size", "65"});
    rejects([](auto& a) { a.weight.packed = nullptr; }, {"packed", "null"});
    rejects([](auto& a) { a.output.device = Device::cuda(9); }, {"cuda:9"});
  }
}

TEST_F(Validation, Matmul) {
  for (const Device device : test_devices()) {
    DeviceWeight weight(device, plain_, random_weight(plain_, 1));
    DeviceArray<float> x(device, 3 * kCols);
    DeviceArray<float> bias(device, kRows);
    DeviceArray<float> y(device, 3 * kRows);
    const auto rejects = [&](const std::function<void(MatmulArgs&)>& change,
                             const std::vector<std::string>& words) {
      MatmulArgs args{{x.data(), 3, kCols, kCols, DType::kFloat32, device},
                      weight.view(),
                      {bias.data(), kRows, DType::kFloat32, device},
                      {y.data(), 3, kRows, kRows, DType::kFloat32, device}};
      change(args);
      expect_rejected([&] { matmul_4bit(args, {}, TestStream(device).get()); }, words);
      expect_rejected([&] { matmul_4bit_workspace_bytes(args); }, words);
      EXPECT_TRUE(y.is_untouched());
    };
    rejects([](auto& a) { a.x.cols = 63; }, {"matmul_4bit", "63", "64"});
    rejects([](auto& a) { a.x.row_stride = 10; }, {"row stride 10", "64"});
    rejects([](auto& a) { a.y.rows = 2; }, {"2 x 6", "3 x 6"});
    rejects([](auto& a) { a.y.cols = 5; }, {"3 x 5", "3 x 6"});
    rejects([](auto& a) { a.y.dtype = DType::kFloat16; }, {"float32", "float16"});
    rejects([](auto& a) { a.bias.size = 7; }, {"bias", "7", "6"});
    rejects([](auto& a) { a.bias.dtype = DType::kBFloat16; }, {"bias", "bfloat16", "float32"});
    rejects([](auto& a) { a.x.data = nullptr; }, {"x is null"});
    rejects([](auto& a) { a.x.device = Device::cuda(4); }, {"x is on cuda:4"});
    rejects([](auto& a) { a.x.rows = a.y.rows = -3; }, {"-3"});
    rejects([](auto& a) { a.x.rows = a.y.rows = int64_t{1} << 62; },
            {"x's 4611686018427387904 rows"});
    rejects([](auto& a) { a.y.row_stride = int64_t{1} << 62; }, {"y's 3 rows", "overflow"});
  }
}

TEST_F(Validation, MatmulTransposed) {
  for (const Device device : test_devices()) {
    DeviceWeight weight(device, plain_, random_weight(plain_, 1));
    DeviceArray<float> dy(device, 3 * kRows);
    DeviceArray<float> dx(device, 3 * kCols);
    const auto rejects = [&](const std::function<void(MatmulTransposedArgs&)>& change,
                             const std::vector<std::string>& words) {
      MatmulTransposedArgs args{{dy.data(), 3, kRows, kRows, DType::kFloat32, device},
                                weight.view(),
                                {dx.data(), 3, kCols, kCols, DType::kFloat32, device}};
      change(args);
      expect_rejected([&] { matmul_4bit_transposed(args, {}, TestStream(device).get()); }, words);
      expect_rejected([&] { matmul_4bit_transposed_workspace_bytes(args); }, words);
      EXPECT_TRUE(dx.is_untouched());
    };
    rejects([](auto& a) { a.dy.cols = 5; }, {"matmul_4bit_transposed", "N = 5", "N = 6"});
    rejects([](auto& a) { a.dx.cols = 63; }, {"3 x 63", "3 x 64"});
    rejects([](auto& a) { a.dx.dtype = DType::kBFloat16; }, {"float32", "bfloat16"});
    rejects([](auto& a) { a.dx.row_stride = 1; }, {"row stride 1"});
    rejects([](auto& a) { a.dy.row_stride = int64_t{1} << 61; }, {"dy's 3 rows", "overflow"});
    rejects([](auto& a) { a.dx.data = nullptr; }, {"dx is null"});
  }
}

TEST_F(Validation, Threads) {
  const int before = cpu_threads();
  expect_rejected([] { set_cpu_threads(0); }, {"0 threads"});
  expect_rejected([] { set_cpu_threads(-2); }, {"-2 threads"});
  EXPECT_EQ(cpu_threads(), before);
}

}  // namespace
}  // namespace qlora_native::testing
