#include "support/grouped_problem.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>

#include "support/number_formats.h"

namespace qlora_native::testing {

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

namespace {

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

double root_mean_square(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

}  // namespace

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

}  // namespace qlora_native::testing
