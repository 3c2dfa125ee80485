// Products that fill a GPU, so that kernels take their largest tiles and cut long depths: outputs chosen at random, against
// fp64 sums over the decoded weight.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "support/kernel_runs.h"
#include "support/number_formats.h"
#include "support/product.h"

namespace qlora_native::testing {
namespace {

/// Returns what ran on the last of the GPUs.
std::vector<std::string> expect_samples_accurate(const Product& p, uint32_t seed) {
  SCOPED_TRACE(::testing::Message() << p.weight << ", M " << p.m << ", " << name(p.dtype));
  const ProductInputs inputs = make_product_inputs(p, seed);
  const std::vector<double> w = reference_decode(p.weight, inputs.weight);
  const double relative =
      unit_roundoff(DType::kFloat32) * (8 + 2 * std::sqrt(static_cast<double>(p.depth()))) +
      unit_roundoff(p.dtype);
  std::vector<std::string> ran;
  for (const Device device : test_devices()) {
    if (!device.is_cuda()) continue;
    ran = for_each_kernel(p.op(), device, [&] {
      const std::vector<double> out = run_product(device, p, inputs);
      std::mt19937 random(seed);
      const auto samples = std::min<size_t>(3000, 4 * out.size());
      for (size_t sample = 0; sample < samples; ++sample) {
        // The last rows and columns too: those of tiles that are not full.
        const int64_t row = sample % 3 == 0 ? p.m - 1 : static_cast<int64_t>(random()) % p.m;
        const int64_t column =
            sample % 3 == 1 ? p.columns() - 1 : static_cast<int64_t>(random()) % p.columns();
        double exact = p.has_bias ? inputs.bias[static_cast<size_t>(column)] : 0.0;
        double magnitude = std::fabs(exact);
        for (int64_t d = 0; d < p.depth(); ++d) {
          const int64_t at = p.transposed ? d * p.weight.cols + column : column * p.weight.cols + d;
          const double term =
              inputs.a[static_cast<size_t>(row * p.depth() + d)] * w[static_cast<size_t>(at)];
          exact += term;
          magnitude += std::fabs(term);
        }
        const double bound =
            std::fabs(exact) * unit_roundoff(p.dtype) * 1.01 + relative * magnitude;
        ASSERT_NEAR(out[static_cast<size_t>(row * p.columns() + column)], exact, bound)
            << "row " << row << ", column " << column;
      }
    });
  }
  return ran;
}

bool has_gpu() {
  for (const Device device : test_devices()) {
    if (device.is_cuda()) return true;
  }
  return false;
}

TEST(LargeMatmul, IsAccurateInEveryTileOfEveryKernel) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  // How gemm_sm80 cuts them for 132 processors: wide tiles, whole; a few more of them than processors, cut; narrow
  // ones, cut; tiles of 64 rows and of 32, cut, two thread blocks on a processor and one; tiles of 32, whole, two on some.
  // The last but two has more tiles above each other than gemm_sm90a works on in turn. In the last two, for dX and
  // forward, it loads the scales of several units at a time for more than a chunk.
  const int64_t shapes[][3] = {{520, 4120, 192},  {300, 11300, 1408}, {650, 320, 2112},
                               {61, 4104, 3136},  {61, 1032, 2112},   {29, 4104, 2112},
                               {29, 1032, 2112},  {29, 17100, 192},   {2309, 136, 192},
                               {200, 3072, 1344}, {60, 1150, 5120}};
  uint32_t seed = 40;
  for (const auto& [m, cols, depth] : shapes) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      const bool double_quant = dtype == DType::kBFloat16;
      const int64_t odd = double_quant ? 3 : 0;
      Product forward{{cols + odd, depth, 64, kNF4, double_quant}, m, dtype, false};
      forward.has_bias = true;
      expect_ran_if_usable("gemm_sm90a", forward.op(), expect_samples_accurate(forward, ++seed));
      const int64_t k = (cols + 63) / 64 * 64;
      const Product dx{{depth, k, 64, kNF4, double_quant}, m, dtype, true};
      expect_ran_if_usable("gemm_sm90a", dx.op(), expect_samples_accurate(dx, ++seed));
    }
  }
}

/// How gemv_mma cuts them: several steps of two groups of rows and of six warps each, four more being idle; two
/// rounds of nine warps, the last of them not full. Rows that are no multiple of four.
TEST(LargeMatmul, IsAccurateInEveryStepAndRoundOfOneAndTwoRows) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  uint32_t seed = 80;
  for (const auto& [rows, cols] : {std::array<int64_t, 2>{4099, 5184}, {1103, 17472}}) {
    for (const int64_t m : {1, 2}) {
      for (const bool double_quant : {false, true}) {
        Product p{{rows, cols, 64, kNF4, double_quant}, m, DType::kBFloat16, false};
        p.has_bias = true;
        expect_samples_accurate(p, ++seed);
      }
    }
  }
}

/// How gemm_mma cuts them on 132 processors: four slabs of K, of 13 warps, the last warp of the last slab with one
/// unit; five slabs; eight groups of rows that take two passes; two slabs and two passes, an odd number of tiles in some;
/// more slabs than processors. Rows that are no multiple of 16.
TEST(LargeMatmul, IsAccurateInEverySlabAndPassOfUpTo16Rows) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  uint32_t seed = 60;
  for (const auto& [rows, cols] : {std::array<int64_t, 2>{1999, 13120},
                                   {33, 20480},
                                   {70003, 320},
                                   {34851, 4160},
                                   {3, 1 << 20}}) {
    for (const bool is_wide : {false, true}) {
      Product p{{rows, cols, 64, kNF4, !is_wide}, is_wide ? 16 : 5, DType::kBFloat16, false};
      p.has_bias = true;
      expect_ran_if_usable("gemm_mma", p.op(), expect_samples_accurate(p, ++seed));
    }
  }
}

TEST(LargeMatmul, RepeatsItsBitsWhateverIsInTheWorkspace) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  const Device device = Device::cuda(0);
  // Depths that the kernels cut: in few tiles, and in some more than there are processors.
  const int64_t shapes[][3] = {
      {1, 520, 4096},  {7, 520, 4096},   {20, 520, 4096},  {7, 520, 12352},  {16, 520, 12352},
      {50, 520, 4096}, {150, 520, 4096}, {29, 4104, 2112}, {61, 4104, 3136}, {300, 11300, 1408}};
  uint32_t seed = 70;
  for (const auto& [m, cols, depth] : shapes) {
    for (const bool transposed : {false, true}) {
      const DType dtype = ++seed % 3 == 0 ? DType::kFloat16 : DType::kBFloat16;
      const WeightSpec weight = transposed
                                    ? WeightSpec{depth, (cols + 63) / 64 * 64, 64, kNF4, true}
                                    : WeightSpec{cols, depth, 64, kNF4, false};
      const Product p{weight, m, dtype, transposed};
      SCOPED_TRACE(::testing::Message() << p.weight << ", M " << p.m << ", " << name(p.dtype));
      const ProductInputs inputs = make_product_inputs(p, seed);
      for_each_kernel(p.op(), device, [&] {
        const ProductRun expected = run_product_in(0xff, device, p, inputs);
        if ((last_kernel(p.op()) == "gemm_sm80" && p.columns() < 1000) ||
            (last_kernel(p.op()) == "gemm_mma" && p.depth() > 4096)) {
          EXPECT_GT(expected.workspace_bytes, 0) << "a few deep tiles are not cut";
        }
        for (const uint8_t in_workspace : {0x00, 0x3c}) {
          EXPECT_EQ(run_product_in(in_workspace, device, p, inputs).out, expected.out);
        }
      });
    }
  }
}

TEST(LargeMatmul, RunsOnTensorCoresWhereADenseLibraryWouldBeFasterStill) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  for (const bool transposed : {false, true}) {
    for (const Codebook& book : {kNF4, uneven_codebook()}) {
      for (const int64_t m : {9, 200, 2000}) {
        const Product p{{256, 128, 64, book, true}, m, DType::kBFloat16, transposed};
        SCOPED_TRACE(::testing::Message() << p.weight << ", M " << m << ", dX " << transposed);
        run_product(Device::cuda(0), p, make_product_inputs(p, 90));
        EXPECT_NE(last_kernel(p.op()), "gemm_simt");
      }
    }
  }
}

}  // namespace
}  // namespace qlora_native::testing
