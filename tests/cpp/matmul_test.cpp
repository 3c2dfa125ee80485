// matmul_4bit and matmul_4bit_transposed against fp64 products of the decoded weight.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "support/kernel_runs.h"
#include "support/number_formats.h"
#include "support/problem.h"
#include "support/product.h"

namespace qlora_native::testing {
namespace {

struct Reference {
  std::vector<double> exact;       ///< fp64 product of the fp32 weights
  std::vector<double> magnitude;   ///< the same of the absolute values
  std::vector<double> from_dtype;  ///< fp64 product of weights rounded to dtype, rounded to dtype
};

Reference multiply(const Product& p, const ProductInputs& inputs) {
  const std::vector<double> w = reference_decode(p.weight, inputs.weight);
  const auto columns = static_cast<size_t>(p.columns());
  const auto depth = static_cast<size_t>(p.depth());
  const auto k_size = static_cast<size_t>(p.weight.cols);
  Reference r;
  for (size_t m = 0; m < static_cast<size_t>(p.m); ++m) {
    for (size_t c = 0; c < columns; ++c) {
      double exact = p.has_bias ? inputs.bias[c] : 0.0;
      double magnitude = std::fabs(exact);
      double rounded = exact;
      for (size_t d = 0; d < depth; ++d) {
        const double a = inputs.a[m * depth + d];
        const double b = p.transposed ? w[d * k_size + c] : w[c * k_size + d];
        exact += a * b;
        magnitude += std::fabs(a * b);
        rounded += a * round_to(p.dtype, b);
      }
      r.exact.push_back(exact);
      r.magnitude.push_back(magnitude);
      r.from_dtype.push_back(round_to(p.dtype, rounded));
    }
  }
  return r;
}

double root_mean_square(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

/// Whether a CPU kernel rounds the weights to the dtype of the activations, as dequantize_4bit does.
bool rounds_weights(const std::string& kernel) { return kernel.ends_with("_amx"); }

void expect_accurate(const Product& p, const Reference& r, const std::vector<double>& actual,
                     Device device) {
  ASSERT_EQ(actual.size(), r.exact.size());
  const double fp32 = unit_roundoff(DType::kFloat32);
  // A sum in fp32 of `depth` terms; matrix units take weights that are rounded to dtype as well.
  double relative = fp32 * (8 + 2 * std::sqrt(static_cast<double>(p.depth())));
  if (device.is_cuda() || rounds_weights(last_kernel(p.op()))) relative += unit_roundoff(p.dtype);
  for (size_t i = 0; i < actual.size(); ++i) {
    const double bound =
        std::fabs(r.exact[i]) * unit_roundoff(p.dtype) * 1.01 + relative * r.magnitude[i];
    ASSERT_NEAR(actual[i], r.exact[i], bound)
        << "row " << i / static_cast<size_t>(p.columns()) << ", column "
        << i % static_cast<size_t>(p.columns());
  }
  if (p.dtype != DType::kFloat32 && actual.size() >= 64) {
    // Kernels that round some weights to the other neighbour have errors as large, but not the same. By simulation the
    // ratio of both scatters by 0.47 / sqrt(outputs) then.
    const double chance = 1.8 / std::sqrt(static_cast<double>(actual.size()));
    EXPECT_LE(root_mean_square(actual, r.exact),
              (1.01 + chance) * root_mean_square(r.from_dtype, r.exact))
        << "worse than dequantize_4bit followed by a product of rounded weights";
  }
}

/// Returns what ran on the last of the test devices, the GPU if there is one.
std::vector<std::string> expect_every_kernel_accurate(const Product& p, uint32_t seed) {
  SCOPED_TRACE(::testing::Message() << p.weight << ", M " << p.m << ", " << name(p.dtype));
  const ProductInputs inputs = make_product_inputs(p, seed);
  const Reference reference = multiply(p, inputs);
  std::vector<std::string> ran;
  for (const Device device : test_devices()) {
    ran = for_each_kernel(p.op(), device, [&] {
      expect_accurate(p, reference, run_product(device, p, inputs), device);
    });
  }
  return ran;
}

/// Also with rows of X or dY that begin at multiples of 16 bytes, which kernels on tensor cores ask for.
void expect_every_kernel_accurate_in_any_rows(Product p, uint32_t seed) {
  expect_every_kernel_accurate(p, seed);
  p.a_padding = (8 - p.depth() % 8) % 8;
  if (p.a_padding > 0) expect_every_kernel_accurate(p, seed);
}

void expect_nan_where_used(const Product& p) {
  SCOPED_TRACE(::testing::Message() << "M " << p.m << ", " << name(p.dtype));
  ProductInputs inputs = make_product_inputs(p, 700);
  inputs.weight.absmax[4] = std::numeric_limits<float>::quiet_NaN();  // row 2, columns 0..63
  for (const Device device : test_devices()) {
    for_each_kernel(p.op(), device, [&] {
      const std::vector<double> out = run_product(device, p, inputs);
      for (size_t i = 0; i < out.size(); ++i) {
        const size_t column = i % static_cast<size_t>(p.columns());
        EXPECT_EQ(std::isnan(out[i]), p.transposed ? column < 64 : column == 2) << i;
      }
    });
  }
}

class Matmul : public ::testing::TestWithParam<bool> {
 protected:
  bool transposed() const { return GetParam(); }
};

INSTANTIATE_TEST_SUITE_P(BothDirections, Matmul, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Transposed" : "Forward"; });

TEST_P(Matmul, EveryNumberOfRows) {
  uint32_t seed = 60;
  const WeightSpec weights[] = {{48, 192, 64, kNF4, true}, {33, 99, 64, kNF4, false}};
  for (const WeightSpec& weight : weights) {
    for (const int64_t m : {1, 2, 3, 4, 5, 8, 14, 15, 17, 64, 130}) {
      expect_every_kernel_accurate({weight, m, kAllDTypes[m % 3], transposed()}, ++seed);
    }
  }
}

TEST_P(Matmul, EveryShape) {
  uint32_t seed = 100;
  // One row; one column; odd; K not a multiple of the block; more than one segment of 64 blocks,
  // with groups that end inside a row; deeper than a panel; blocks longer than a row.
  const int64_t shapes[][3] = {{1, 64, 64},    {1, 4096, 4096}, {64, 1, 64},    {7, 99, 32},
                               {13, 31, 64},   {5, 192, 128},   {9, 4480, 64},  {3, 2112, 32},
                               {300, 64, 64},  {270, 33, 64},   {40, 96, 4096}, {64, 160, 32},
                               {2, 8192, 2048}};
  for (const auto& [rows, cols, block_size] : shapes) {
    for (const bool double_quant : {false, true}) {
      const WeightSpec weight{rows, cols, block_size, kNF4, double_quant};
      for (const int64_t m : {1, 3, 20}) {
        expect_every_kernel_accurate({weight, m, kAllDTypes[(rows + m) % 3], transposed()}, ++seed);
      }
    }
  }
}

TEST_P(Matmul, EveryTypeAndDtype) {
  uint32_t seed = 200;
  for (const Codebook& book : {kNF4, kFP4, kINT4, uneven_codebook()}) {
    for (const DType dtype : kAllDTypes) {
      for (const int64_t m : {1, 6, 18, 70, 130}) {
        expect_every_kernel_accurate({{24, 128, 64, book, true}, m, dtype, transposed()}, ++seed);
      }
    }
  }
}

/// What the bfloat16 kernels cut a product into: sixteen rows, chunks of 64 weights, pieces of two,
/// segments of 4096, panels of 256 and 512, long depths; each with a remainder, and each block size.
TEST_P(Matmul, BFloat16OfEveryCut) {
  uint32_t seed = 250;
  const int64_t shapes[][3] = {{1, 1, 32},      {2, 63, 64},      {31, 64, 64},   {33, 65, 32},
                               {48, 192, 64},   {17, 320, 128},   {16, 4096, 64}, {18, 4224, 64},
                               {5, 4160, 4096}, {35, 832, 256},   {290, 128, 64}, {515, 64, 512},
                               {70, 576, 1024}, {12, 1984, 2048}, {1304, 64, 64}, {72, 2112, 128}};
  for (const auto& [rows, cols, block_size] : shapes) {
    const WeightSpec weight{rows, cols, block_size, kNF4, seed % 2 == 0};
    for (const int64_t m : {1, 5, 16, 29, 33, 65}) {
      expect_every_kernel_accurate_in_any_rows({weight, m, DType::kBFloat16, transposed()}, ++seed);
    }
  }
}

TEST_P(Matmul, MoreTilesThanOnePass) {
  const WeightSpec wide{transposed() ? 72 : 17000, transposed() ? 17024 : 64, 64, kNF4, true};
  expect_every_kernel_accurate({wide, 3, DType::kBFloat16, transposed()}, 391);
  // Deep and not even, as dX has it.
  for (const WeightSpec& weight :
       {WeightSpec{35, 640, 64, kNF4, true}, {1099, 192, 512, kNF4, true}}) {
    expect_every_kernel_accurate_in_any_rows({weight, 530, DType::kBFloat16, transposed()}, 390);
  }
}

TEST_P(Matmul, StridedRows) {
  uint32_t seed = 300;
  for (const int64_t m : {1, 5, 33, 70}) {
    Product p{{17, 128, 64, kNF4, true}, m, DType::kBFloat16, transposed()};
    p.out_padding = 5;
    p.a_padding = 3;
    expect_every_kernel_accurate(p, ++seed);
    // Rows that are aligned, though the depth ends within 16 bytes of dY.
    p.a_padding = 8 - p.depth() % 8;
    expect_ran_if_usable("gemm_sm80", p.op(), expect_every_kernel_accurate(p, ++seed));
  }
}

TEST_P(Matmul, MoreRowsThanOnePass) {
  expect_every_kernel_accurate({{37, 128, 64, kNF4, false}, 300, DType::kFloat32, transposed()},
                               400);
}

TEST_P(Matmul, RepeatsItsBitsWithEveryNumberOfThreads) {
  // The bfloat16 kernels have a way of their own for up to 64 rows.
  for (const int64_t m : {1, 4, 37, 40, 70}) {
    const DType dtype = m % 4 == 0 ? DType::kFloat32 : DType::kBFloat16;
    const Product p{{130, 2304, 64, kNF4, true}, m, dtype, transposed()};
    const ProductInputs inputs = make_product_inputs(p, 500);
    for_each_kernel(p.op(), Device::cpu(), [&] {
      const int threads_before = cpu_threads();
      set_cpu_threads(1);
      const std::vector<double> expected = run_product(Device::cpu(), p, inputs);
      for (const int threads : {2, 5}) {
        set_cpu_threads(threads);
        EXPECT_EQ(run_product(Device::cpu(), p, inputs), expected) << threads << " threads";
      }
      set_cpu_threads(threads_before);
    });
  }
}

TEST_P(Matmul, NothingToDo) {
  for (const Device device : test_devices()) {
    const TestStream stream(device);
    for (const DType dtype : kAllDTypes) {
      for (const auto& [m, rows, cols] :
           {std::array<int64_t, 3>{0, 8, 64}, {3, 0, 64}, {1, 8, 0}, {3, 8, 0}, {40, 8, 0}}) {
        const Product p{{rows, cols, 64, kNF4, false}, m, dtype, transposed()};
        const std::vector<double> out = run_product(device, p, make_product_inputs(p, 600));
        // Without a term the sum is zero.
        EXPECT_EQ(out, std::vector<double>(static_cast<size_t>(p.m * p.columns()), 0.0));
      }
    }
  }
}

/// Of W: rows of dY with six elements are not aligned to 16 bytes, with eight they are.
constexpr int64_t kOddAndAlignedRows[] = {6, 8};

TEST_P(Matmul, NanBlocksSpreadOnlyToWhatUsesThem) {
  for (const DType dtype : kAllDTypes) {
    for (const int64_t m : {3, 70}) {
      for (const int64_t rows : kOddAndAlignedRows) {
        expect_nan_where_used({{rows, 128, 64, kNF4, false}, m, dtype, transposed()});
      }
    }
  }
}

TEST_P(Matmul, ZeroBlocksAndRowsGiveZeros) {
  for (const int64_t rows : kOddAndAlignedRows) {
    for (const int64_t m : {3, 70}) {
      const Product p{{rows, 128, 64, kNF4, false}, m, DType::kBFloat16, transposed()};
      ProductInputs inputs = make_product_inputs(p, 710);
      std::fill(inputs.weight.absmax.begin(), inputs.weight.absmax.end(), 0.0f);
      const std::vector<double> zeros(static_cast<size_t>(p.m * p.columns()), 0.0);
      for (const Device device : test_devices()) {
        for_each_kernel(p.op(), device, [&] { EXPECT_EQ(run_product(device, p, inputs), zeros); });
      }
    }
  }
}

void expect_infinity_stays_in_its_row(const Product& p) {
  SCOPED_TRACE(::testing::Message() << p.weight << ", M " << p.m << ", " << name(p.dtype));
  ProductInputs inputs = make_product_inputs(p, 720);
  inputs.a[static_cast<size_t>(p.depth())] = std::numeric_limits<double>::infinity();  // row 1
  for (const Device device : test_devices()) {
    for_each_kernel(p.op(), device, [&] {
      const std::vector<double> out = run_product(device, p, inputs);
      for (size_t i = 0; i < out.size(); ++i) {
        EXPECT_EQ(std::isfinite(out[i]), i / static_cast<size_t>(p.columns()) != 1) << i;
      }
    });
  }
}

TEST_P(Matmul, AnInfinityOfARowStaysInIt) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t rows : kOddAndAlignedRows) {
      for (const int64_t m : {3, 70}) {
        expect_infinity_stays_in_its_row({{rows, 128, 64, kNF4, false}, m, dtype, transposed()});
      }
    }
  }
}

TEST(MatmulBias, IsAddedBeforeTheOneRounding) {
  uint32_t seed = 800;
  for (const DType dtype : kAllDTypes) {
    for (const int64_t m : {1, 5, 21}) {
      for (const int64_t cols : {128, 99}) {
        Product p{{65, cols, 64, kNF4, true}, m, dtype, false};
        p.has_bias = true;
        expect_every_kernel_accurate(p, ++seed);
      }
    }
  }
}

TEST(MatmulBias, IsAllThereIsWhenKIsZero) {
  Product p{{9, 0, 64, kNF4, false}, 4, DType::kBFloat16, false};
  p.has_bias = true;
  const ProductInputs inputs = make_product_inputs(p, 900);
  for (const Device device : test_devices()) {
    for_each_kernel(p.op(), device, [&] {
      const std::vector<double> out = run_product(device, p, inputs);
      for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], inputs.bias[i % 9]) << i;
    });
  }
}

TEST(MatmulKernels, OnTheCpuOnlyGemvDeclinesAShape) {
  for (const bool transposed : {false, true}) {
    const Product p{{5, 99, 64, kNF4, false}, 2, DType::kBFloat16, transposed};
    const ProductInputs inputs = make_product_inputs(p, 1000);
    const auto ran =
        for_each_kernel(p.op(), Device::cpu(), [&] { run_product(Device::cpu(), p, inputs); });
    for (const std::string& kernel : usable_kernels(p.op(), Device::cpu())) {
      const bool declines = kernel.starts_with("gemv");
      EXPECT_EQ(std::find(ran.begin(), ran.end(), kernel) == ran.end(), declines) << kernel;
    }
  }
}

/// The measured choices between the CPU kernels (bench/NOTES.md).
TEST_P(Matmul, OnACpuWithAmxAFewRowsTakeGemvAndMoreTakeAmx) {
  const std::vector<std::string> kernels =
      usable_kernels(transposed() ? Op::kMatmul4bitTransposed : Op::kMatmul4bit, Device::cpu());
  if (std::find(kernels.begin(), kernels.end(), "gemm_amx") == kernels.end()) {
    GTEST_SKIP() << "this processor has no AMX";
  }
  const auto selected = [&](int64_t m, int64_t cols, DType dtype) {
    const Product p{{8, cols, 64, kNF4, false}, m, dtype, transposed()};
    run_product(Device::cpu(), p, make_product_inputs(p, 1100));
    return last_kernel(p.op());
  };
  EXPECT_EQ(selected(4, 128, DType::kBFloat16), "gemv_avx512");
  EXPECT_EQ(selected(5, 128, DType::kBFloat16), "gemm_amx");
  EXPECT_EQ(selected(200, 128, DType::kBFloat16), "gemm_amx");
  EXPECT_EQ(selected(1, 99, DType::kBFloat16), "gemm_amx") << "gemv declines the shape";
  EXPECT_EQ(selected(12, 128, DType::kFloat32), "gemv_avx512");
  EXPECT_EQ(selected(13, 128, DType::kFloat16), "gemm_avx512");
}

}  // namespace
}  // namespace qlora_native::testing
