// grouped_matmul_4bit and its transposed twin against fp64 products of every group's decoded matrix.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "support/grouped_problem.h"
#include "support/kernel_runs.h"
#include "support/number_formats.h"

namespace qlora_native::testing {
namespace {

/// Returns what ran on the last of the test devices, the GPU if there is one.
std::vector<std::string> expect_every_kernel_accurate(const Grouped& g, uint32_t seed) {
  SCOPED_TRACE(::testing::Message() << g.weight << ", groups " << ::testing::PrintToString(g.sizes)
                                    << ", " << name(g.dtype));
  const Inputs inputs = make_inputs(g, seed);
  const Reference reference = multiply(g, inputs);
  std::vector<std::string> ran;
  for (const Device device : test_devices()) {
    ran = for_each_kernel(
        g.op(), device, [&] { expect_accurate(g, reference, run_on(device, g, inputs), device); });
  }
  return ran;
}

class GroupedMatmul : public ::testing::TestWithParam<bool> {
 protected:
  bool transposed() const { return GetParam(); }
};

INSTANTIATE_TEST_SUITE_P(BothDirections, GroupedMatmul, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Transposed" : "Forward"; });

TEST_P(GroupedMatmul, EveryPartition) {
  uint32_t seed = 50;
  std::vector<int64_t> scattered(300, 0);  // more groups than a warp looks at
  for (const size_t group : {0, 31, 32, 33, 150, 298, 299}) {
    scattered[group] = static_cast<int64_t>(group) % 5 + 1;
  }
  const std::vector<int64_t> partitions[] = {{1},
                                             {5},
                                             {0, 0, 3},
                                             {4, 0, 0, 2, 0},
                                             {1, 1, 1, 1, 1, 1, 1, 1},
                                             {3, 17, 64, 0, 65, 1, 130},
                                             {0, 0, 300, 0},
                                             {16, 16, 16},
                                             {128, 64, 127},
                                             {40, 0, 12, 13, 4, 5, 200, 1},
                                             scattered};
  for (const std::vector<int64_t>& sizes : partitions) {
    for (const DType dtype : kAllDTypes) {
      const WeightSpec weight{48, 192, 64, kNF4, dtype == DType::kBFloat16};
      expect_every_kernel_accurate({weight, sizes, dtype, transposed()}, ++seed);
    }
  }
}

TEST_P(GroupedMatmul, EveryShape) {
  uint32_t seed = 200;
  // One row; one column; odd, with matrices that begin inside of a word; K that is no multiple of a
  // block or of a tile; blocks longer than a row; more columns, and more depth, than a tile.
  const int64_t shapes[][3] = {{1, 64, 64},   {64, 1, 64},    {7, 99, 32},     {13, 31, 64},
                               {9, 4480, 64}, {3, 2112, 32},  {300, 64, 64},   {270, 33, 64},
                               {5, 192, 128}, {40, 96, 4096}, {200, 320, 128}, {129, 128, 64},
                               {65, 448, 64}, {8, 8192, 2048}};
  for (const auto& [rows, cols, block_size] : shapes) {
    for (const bool double_quant : {false, true}) {
      const WeightSpec weight{rows, cols, block_size, kNF4, double_quant};
      for (const DType dtype : kAllDTypes) {
        const std::vector<int64_t> sizes = {2, 0, 20 + rows % 3, 1};
        expect_every_kernel_accurate({weight, sizes, dtype, transposed()}, ++seed);
      }
    }
  }
}

TEST_P(GroupedMatmul, EveryTypeAndDtype) {
  uint32_t seed = 400;
  for (const Codebook& book : {kNF4, kFP4, kINT4, uneven_codebook()}) {
    for (const DType dtype : kAllDTypes) {
      for (const bool double_quant : {false, true}) {
        const WeightSpec weight{72, 128, 64, book, double_quant};
        expect_every_kernel_accurate({weight, {1, 6, 0, 70}, dtype, transposed()}, ++seed);
      }
    }
  }
}

TEST_P(GroupedMatmul, StridesAndBothIndexTypes) {
  uint32_t seed = 500;
  // dY's rows are 17 elements: 7 more align them, and the depth ends within 16 bytes. 8 do for X's 128.
  for (const int64_t padding : {1, 3, transposed() ? 7 : 8}) {
    for (const IndexType type : {IndexType::kInt32, IndexType::kInt64}) {
      Grouped g{{17, 128, 64, kNF4, padding != 3}, {5, 0, 33, 1}, DType::kBFloat16, transposed()};
      g.padding = padding;
      g.index_type = type;
      g.has_bias = !transposed();
      g.rows_of_none = 2;
      const std::vector<std::string> ran = expect_every_kernel_accurate(g, ++seed);
      if (padding > 3) expect_ran_if_usable("mma", g.op(), ran);
    }
  }
}

TEST_P(GroupedMatmul, RowsOfNoGroupAreZero) {
  uint32_t seed = 600;
  const std::vector<int64_t> partitions[] = {{3, 0, 70}, {0, 0}, {}};
  for (const std::vector<int64_t>& sizes : partitions) {
    for (const DType dtype : kAllDTypes) {
      for (const int64_t rows : {1, 150}) {
        Grouped g{{40, 64, 64, kNF4, true}, sizes, dtype, transposed()};
        g.rows_of_none = rows;
        expect_every_kernel_accurate(g, ++seed);
      }
    }
  }
}

TEST_P(GroupedMatmul, AMatrixWithoutRowsIsNotUsed) {
  for (const DType dtype : kAllDTypes) {
    const Grouped g{{70, 128, 64, kNF4, false}, {4, 0, 90, 0}, dtype, transposed()};
    Inputs inputs = make_inputs(g, 700);
    const Reference reference = multiply(g, inputs);
    for (const size_t unused : {1, 3}) {
      std::vector<float>& absmax = inputs.weights[unused].absmax;
      std::fill(absmax.begin(), absmax.end(), std::numeric_limits<float>::quiet_NaN());
    }
    for (const Device device : test_devices()) {
      for_each_kernel(g.op(), device,
                      [&] { expect_accurate(g, reference, run_on(device, g, inputs), device); });
    }
  }
}

TEST_P(GroupedMatmul, ANanOrAnInfinityStaysInItsGroup) {
  for (const DType dtype : kAllDTypes) {
    const Grouped g{{70, 128, 64, kNF4, false}, {3, 70, 5}, dtype, transposed()};
    Inputs inputs = make_inputs(g, 720);
    inputs.weights[1].absmax[4] = std::numeric_limits<float>::quiet_NaN();  // row 2, columns 0..63
    inputs.a[0] = std::numeric_limits<double>::infinity();
    const auto columns = static_cast<size_t>(g.columns());
    for (const Device device : test_devices()) {
      for_each_kernel(g.op(), device, [&] {
        const std::vector<double> out = run_on(device, g, inputs);
        for (size_t i = 0; i < out.size(); ++i) {
          const size_t row = i / columns;
          const size_t column = i % columns;
          const bool is_nan = row >= 3 && row < 73 && (transposed() ? column < 64 : column == 2);
          if (row == 0) continue;
          EXPECT_EQ(std::isfinite(out[i]), !is_nan) << row << ", " << column;
        }
      });
    }
  }
}

TEST_P(GroupedMatmul, RepeatsItsBitsWithEveryNumberOfThreads) {
  for (const DType dtype : kAllDTypes) {
    const Grouped g{{130, 2304, 64, kNF4, true}, {3, 90, 0, 1, 13, 2, 2}, dtype, transposed()};
    const Inputs inputs = make_inputs(g, 800);
    for_each_kernel(g.op(), Device::cpu(), [&] {
      const int threads_before = cpu_threads();
      set_cpu_threads(1);
      const std::vector<double> expected = run_on(Device::cpu(), g, inputs);
      for (const int threads : {2, 5}) {
        set_cpu_threads(threads);
        EXPECT_EQ(run_on(Device::cpu(), g, inputs), expected) << threads << " threads";
      }
      set_cpu_threads(threads_before);
    });
    for (const Device device : test_devices()) {
      for_each_kernel(g.op(), device, [&] {
        EXPECT_EQ(run_on(device, g, inputs), run_on(device, g, inputs)) << to_string(device);
      });
    }
  }
}

TEST_P(GroupedMatmul, NothingToDo) {
  for (const Device device : test_devices()) {
    for (const DType dtype : kAllDTypes) {
      for (const auto& [rows, cols, m] :
           {std::array<int64_t, 3>{8, 64, 0}, {0, 64, 3}, {8, 0, 3}, {8, 0, 40}}) {
        const Grouped g{{rows, cols, 64, kNF4, false}, {0, m}, dtype, transposed()};
        const std::vector<double> out = run_on(device, g, make_inputs(g, 900));
        EXPECT_EQ(out, std::vector<double>(static_cast<size_t>(g.m() * g.columns()), 0.0));
      }
    }
  }
}

TEST(GroupedMatmulBias, IsThatOfTheGroupAndAddedBeforeTheOneRounding) {
  uint32_t seed = 1000;
  for (const DType dtype : kAllDTypes) {
    for (const int64_t cols : {128, 99, 0}) {
      Grouped g{{65, cols, 64, kNF4, cols == 128}, {1, 0, 5, 80}, dtype};
      g.has_bias = true;
      g.rows_of_none = 3;
      expect_every_kernel_accurate(g, ++seed);
    }
  }
}

/// The CPU refuses ends out of order; a GPU keeps to its arrays.
TEST_P(GroupedMatmul, WrongEnds) {
  struct Case {
    std::vector<int64_t> given;
    std::vector<int64_t> taken;
    std::vector<std::string> words;
  };
  const Case cases[] = {{{4, 3, 9}, {4, 4, 9}, {"group 1", "3", "after 4", "9 rows"}},
                        {{-2, 3, 9}, {0, 3, 9}, {"group 0", "-2"}},
                        {{4, 10, 9}, {4, 9, 9}, {"group 1", "10", "9 rows"}},
                        {{1 << 30, -5, 7}, {9, 9, 9}, {"group 0", "1073741824"}}};
  for (const auto& [given, taken, words] : cases) {
    Grouped g{{24, 64, 64, kNF4, true}, {}, DType::kFloat32, transposed()};
    g.sizes = {taken[0], taken[1] - taken[0], taken[2] - taken[1]};
    Inputs inputs = make_inputs(g, 1100);
    const Reference reference = multiply(g, inputs);
    inputs.ends = given;
    for (const Device device : test_devices()) {
      if (device.is_cpu()) {
        try {
          run_on(device, g, inputs);
          ADD_FAILURE() << "accepted " << ::testing::PrintToString(given);
        } catch (const InvalidArgument& error) {
          for (const std::string& word : words) {
            EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
          }
        }
        continue;
      }
      for_each_kernel(g.op(), device,
                      [&] { expect_accurate(g, reference, run_on(device, g, inputs), device); });
    }
  }
}

/// Few rows of every group go to gemv, the rest elsewhere (as for one matrix).
TEST_P(GroupedMatmul, OnACpuTheLargestGroupDecides) {
  const auto kernels = usable_kernels(
      transposed() ? Op::kGroupedMatmul4bitTransposed : Op::kGroupedMatmul4bit, Device::cpu());
  if (std::find(kernels.begin(), kernels.end(), "gemv_avx2") == kernels.end()) {
    GTEST_SKIP() << "this processor has only the portable kernel";
  }
  const auto selected = [&](std::vector<int64_t> sizes, int64_t cols) {
    const Grouped g{{8, cols, 64, kNF4, false}, std::move(sizes), DType::kFloat32, transposed()};
    run_on(Device::cpu(), g, make_inputs(g, 1200));
    return last_kernel(g.op());
  };
  EXPECT_TRUE(selected({12, 0, 12, 3}, 128).starts_with("gemv_"));
  EXPECT_TRUE(selected({1, 13}, 128).starts_with("gemm_"));
  EXPECT_TRUE(selected({1, 2}, 99).starts_with("gemm_")) << "gemv declines the shape";
}

}  // namespace
}  // namespace qlora_native::testing
