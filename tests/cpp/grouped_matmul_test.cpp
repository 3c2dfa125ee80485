// grouped_matmul_4bit and its transposed twin against fp64 products of every group's decoded matrix.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "support/kernel_runs.h"
#include "support/number_formats.h"
#include "support/problem.h"

namespace qlora_native::testing {
namespace {

/// What the library is asked for.
struct Grouped {
  WeightSpec weight;           ///< of every matrix
  std::vector<int64_t> sizes;  ///< rows of each group
  DType dtype = DType::kFloat32;
  bool transposed = false;
  bool has_bias = false;
  int64_t rows_of_none = 0;  ///< rows after those of the last group
  int64_t padding = 0;       ///< elements between rows, and between the parts of matrices
  IndexType index_type = IndexType::kInt64;

  int64_t groups() const { return static_cast<int64_t>(sizes.size()); }
  int64_t m() const {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) + rows_of_none;
  }
  int64_t depth() const { return transposed ? weight.rows : weight.cols; }
  int64_t columns() const { return transposed ? weight.cols : weight.rows; }
  Op op() const { return transposed ? Op::kGroupedMatmul4bitTransposed : Op::kGroupedMatmul4bit; }
  std::vector<int64_t> ends() const {
    std::vector<int64_t> ends(sizes.size());
    std::partial_sum(sizes.begin(), sizes.end(), ends.begin());
    return ends;
  }
};

struct Inputs {
  std::vector<HostWeight> weights;
  std::vector<double> a;     ///< [m, depth]
  std::vector<double> bias;  ///< [groups, columns] or empty
  std::vector<int64_t> ends;
};

Inputs make_inputs(const Grouped& g, uint32_t seed) {
  Inputs inputs;
  for (int64_t e = 0; e < g.groups(); ++e) {
    inputs.weights.push_back(random_weight(g.weight, seed + 10 + static_cast<uint32_t>(e)));
  }
  inputs.a = gaussian(g.m() * g.depth(), g.dtype, seed + 1);
  if (g.has_bias) inputs.bias = gaussian(g.groups() * g.columns(), g.dtype, seed + 2);
  inputs.ends = g.ends();
  return inputs;
}

struct Reference {
  std::vector<double> exact;       ///< fp64 product of the fp32 weights
  std::vector<double> magnitude;   ///< the same of the absolute values
  std::vector<double> from_dtype;  ///< with weights rounded to dtype, rounded to dtype
};

Reference multiply(const Grouped& g, const Inputs& inputs) {
  const auto columns = static_cast<size_t>(g.columns());
  const auto depth = static_cast<size_t>(g.depth());
  const auto k_size = static_cast<size_t>(g.weight.cols);
  Reference r;
  size_t row = 0;
  for (size_t e = 0; e < g.sizes.size(); ++e) {
    if (g.sizes[e] == 0) continue;
    const std::vector<double> w = reference_decode(g.weight, inputs.weights[e]);
    for (int64_t i = 0; i < g.sizes[e]; ++i, ++row) {
      for (size_t c = 0; c < columns; ++c) {
        double exact = g.has_bias ? inputs.bias[e * columns + c] : 0.0;
        double magnitude = std::fabs(exact);
        double rounded = exact;
        for (size_t d = 0; d < depth; ++d) {
          const double a = inputs.a[row * depth + d];
          const double b = g.transposed ? w[d * k_size + c] : w[c * k_size + d];
          exact += a * b;
          magnitude += std::fabs(a * b);
          rounded += a * round_to(g.dtype, b);
        }
        r.exact.push_back(exact);
        r.magnitude.push_back(magnitude);
        r.from_dtype.push_back(round_to(g.dtype, rounded));
      }
    }
  }
  const auto all = static_cast<size_t>(g.m() * g.columns());
  r.exact.resize(all);
  r.magnitude.resize(all);
  r.from_dtype.resize(all);
  return r;
}

/// Rows of `cols` elements of `bytes` with `padding` poisoned ones behind each.
template <class T>
std::vector<T> with_padding(const std::vector<T>& dense, int64_t cols, int64_t padding) {
  if (cols == 0) return {};
  std::vector<T> padded;
  std::vector<uint8_t> poison(sizeof(T), 0xff);
  T value;
  std::memcpy(&value, poison.data(), sizeof(T));
  for (auto row = dense.begin(); row != dense.end(); row += cols) {
    padded.insert(padded.end(), row, row + cols);
    padded.insert(padded.end(), static_cast<size_t>(padding), value);
  }
  return padded;
}

/// The matrices of all groups on a device, part after part.
class DeviceStack {
 public:
  DeviceStack(Device device, const Grouped& g, const std::vector<HostWeight>& weights)
      : device_(device),
        g_(g),
        packed_(device, part(weights, &HostWeight::packed, 16 * g.padding)),
        absmax_(device, part(weights, &HostWeight::absmax, g.padding)),
        codes_(device, part(weights, &HostWeight::absmax_codes, g.padding)),
        absmax2_(device, part(weights, &HostWeight::absmax2, g.padding)),
        offset_(device, part(weights, &HostWeight::offset, g.padding)) {}

  QuantizedStackView view() {
    const WeightSpec& spec = g_.weight;
    QuantizedStackView stack;
    stack.first = {packed_.data(), {},     spec.rows, spec.cols, spec.block_size,
                   spec.codebook,  device_};
    if (spec.double_quant) {
      stack.first.absmax = {nullptr, codes_.data(), absmax2_.data(), offset_.data()};
      stack.absmax2_stride = spec.groups() + g_.padding;
      stack.offset_stride = 1 + g_.padding;
    } else {
      stack.first.absmax.values = absmax_.data();
    }
    stack.count = g_.groups();
    stack.packed_stride = packed_bytes(spec.numel()) + 16 * g_.padding;
    stack.absmax_stride = spec.blocks() + g_.padding;
    return stack;
  }

 private:
  template <class T>
  static std::vector<T> part(const std::vector<HostWeight>& weights, std::vector<T> HostWeight::* m,
                             int64_t padding) {
    std::vector<T> all;
    for (const HostWeight& weight : weights) {
      const auto cols = static_cast<int64_t>((weight.*m).size());
      const std::vector<T> padded = with_padding(weight.*m, cols, padding);
      all.insert(all.end(), padded.begin(), padded.end());
    }
    return all;
  }

  template <class T>
  struct Array : DeviceArray<T> {
    Array(Device device, const std::vector<T>& values)
        : DeviceArray<T>(device, std::span<const T>(values)) {}
  };

  Device device_;
  const Grouped& g_;
  Array<uint8_t> packed_;
  Array<float> absmax_;
  Array<uint8_t> codes_;
  Array<float> absmax2_;
  Array<float> offset_;
};

std::vector<uint8_t> bytes_of(const std::vector<int64_t>& ends, IndexType type) {
  std::vector<uint8_t> bytes;
  for (const int64_t end : ends) {
    const auto* const begin = reinterpret_cast<const uint8_t*>(&end);  // little-endian
    bytes.insert(bytes.end(), begin, begin + (type == IndexType::kInt32 ? 4 : 8));
  }
  return bytes;
}

/// Runs the operation; returns out, dense, having checked that nothing else was written.
std::vector<double> run_on(Device device, const Grouped& g, const Inputs& inputs) {
  DeviceStack stack(device, g, inputs.weights);
  const int64_t width = size_bytes(g.dtype);
  const auto a_bytes =
      with_padding(to_bytes(g.dtype, inputs.a), g.depth() * width, g.padding * width);
  const auto bias_bytes =
      with_padding(to_bytes(g.dtype, inputs.bias), g.columns() * width, g.padding * width);
  const auto end_bytes = bytes_of(inputs.ends, g.index_type);
  DeviceArray<uint8_t> a(device, std::span<const uint8_t>(a_bytes));
  DeviceArray<uint8_t> bias(device, std::span<const uint8_t>(bias_bytes));
  DeviceArray<uint8_t> ends(device, std::span<const uint8_t>(end_bytes));
  const int64_t out_stride = g.columns() + g.padding;
  DeviceArray<uint8_t> out(device, g.m() * out_stride * width);

  const MatrixView a_view{a.data(), g.m(), g.depth(), g.depth() + g.padding, g.dtype, device};
  const MutableMatrixView out_view{out.data(), g.m(), g.columns(), out_stride, g.dtype, device};
  const GroupEnds ends_view{ends.data(), g.groups(), g.index_type, device};
  const TestStream stream(device);
  const auto run = [&](auto bytes, auto operation, const auto& args) {
    DeviceArray<uint8_t> workspace(device, bytes(args));
    operation(args, Workspace{workspace.data(), workspace.size()}, stream.get());
    stream.synchronize();
    workspace.expect_guards_intact();
  };
  if (g.transposed) {
    const GroupedMatmulTransposedArgs args{a_view, ends_view, stack.view(), out_view};
    run(grouped_matmul_4bit_transposed_workspace_bytes, grouped_matmul_4bit_transposed, args);
  } else {
    GroupedMatmulArgs args{a_view, ends_view, stack.view(), {}, out_view};
    if (g.has_bias) {
      args.bias = {bias.data(), g.groups(), g.columns(), g.columns() + g.padding, g.dtype, device};
    }
    run(grouped_matmul_4bit_workspace_bytes, grouped_matmul_4bit, args);
  }
  out.expect_guards_intact();

  const std::vector<uint8_t> bytes = out.to_host();
  std::vector<uint8_t> dense;
  for (int64_t row = 0; row < g.m(); ++row) {
    const auto begin = bytes.begin() + row * out_stride * width;
    dense.insert(dense.end(), begin, begin + g.columns() * width);
    for (int64_t i = g.columns() * width; i < out_stride * width; ++i) {
      EXPECT_EQ(begin[i], 0xff) << "padding of row " << row << " was written to";
    }
  }
  return from_bytes(g.dtype, dense);
}

double root_mean_square(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

void expect_accurate(const Grouped& g, const Reference& r, const std::vector<double>& actual,
                     Device device) {
  ASSERT_EQ(actual.size(), r.exact.size());
  double relative =
      unit_roundoff(DType::kFloat32) * (8 + 2 * std::sqrt(static_cast<double>(g.depth())));
  // Matrix units take weights that are rounded to dtype.
  if (device.is_cuda() || last_kernel(g.op()).ends_with("_amx")) {
    relative += unit_roundoff(g.dtype);
  }
  const double subnormal = g.dtype == DType::kFloat16 ? 0x1p-25 : 0.0;  // half of the least step
  for (size_t i = 0; i < actual.size(); ++i) {
    const double bound = std::fabs(r.exact[i]) * unit_roundoff(g.dtype) * 1.01 +
                         relative * r.magnitude[i] + subnormal;
    ASSERT_NEAR(actual[i], r.exact[i], bound)
        << "row " << i / static_cast<size_t>(g.columns()) << ", column "
        << i % static_cast<size_t>(g.columns());
  }
  if (g.dtype != DType::kFloat32 && actual.size() >= 64) {
    EXPECT_LE(root_mean_square(actual, r.exact), 1.02 * root_mean_square(r.from_dtype, r.exact))
        << "worse than dequantize_4bit followed by a product of rounded weights";
  }
}

void expect_every_kernel_accurate(const Grouped& g, uint32_t seed) {
  SCOPED_TRACE(::testing::Message() << g.weight << ", groups " << ::testing::PrintToString(g.sizes)
                                    << ", " << name(g.dtype));
  const Inputs inputs = make_inputs(g, seed);
  const Reference reference = multiply(g, inputs);
  for (const Device device : test_devices()) {
    for_each_kernel(g.op(), device,
                    [&] { expect_accurate(g, reference, run_on(device, g, inputs), device); });
  }
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
  for (const int64_t padding : {1, 3, 8}) {
    for (const IndexType type : {IndexType::kInt32, IndexType::kInt64}) {
      Grouped g{{17, 128, 64, kNF4, padding != 3}, {5, 0, 33, 1}, DType::kBFloat16, transposed()};
      g.padding = padding;
      g.index_type = type;
      g.has_bias = !transposed();
      g.rows_of_none = 2;
      expect_every_kernel_accurate(g, ++seed);
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
