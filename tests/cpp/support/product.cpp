#include "support/product.h"

#include <gtest/gtest.h>

#include <span>

#include "support/device_array.h"
#include "support/number_formats.h"

namespace qlora_native::testing {
namespace {

/// Rows of `cols` values with `padding` poisoned elements behind each.
std::vector<uint8_t> with_padding(DType dtype, const std::vector<double>& values, int64_t rows,
                                  int64_t cols, int64_t padding) {
  std::vector<uint8_t> bytes;
  const std::vector<uint8_t> dense = to_bytes(dtype, values);
  const int64_t row_bytes = cols * size_bytes(dtype);
  for (int64_t row = 0; row < rows; ++row) {
    bytes.insert(bytes.end(), dense.begin() + row * row_bytes,
                 dense.begin() + (row + 1) * row_bytes);
    bytes.insert(bytes.end(), static_cast<size_t>(padding * size_bytes(dtype)), 0xff);
  }
  return bytes;
}

}  // namespace

ProductInputs make_product_inputs(const Product& p, uint32_t seed) {
  ProductInputs inputs;
  inputs.weight = random_weight(p.weight, seed);
  inputs.a = gaussian(p.m * p.depth(), p.dtype, seed + 1);
  if (p.has_bias) inputs.bias = gaussian(p.columns(), p.dtype, seed + 2);
  return inputs;
}

ProductRun run_product_in(uint8_t in_workspace, Device device, const Product& p,
                          const ProductInputs& inputs) {
  DeviceWeight weight(device, p.weight, inputs.weight);
  const auto a_bytes = with_padding(p.dtype, inputs.a, p.m, p.depth(), p.a_padding);
  const auto bias_bytes = to_bytes(p.dtype, inputs.bias);
  DeviceArray<uint8_t> a(device, std::span<const uint8_t>(a_bytes));
  DeviceArray<uint8_t> bias(device, std::span<const uint8_t>(bias_bytes));
  const int64_t out_stride = p.columns() + p.out_padding;
  DeviceArray<uint8_t> out(device, p.m * out_stride * size_bytes(p.dtype));

  const MatrixView a_view{a.data(), p.m, p.depth(), p.depth() + p.a_padding, p.dtype, device};
  const MutableMatrixView out_view{out.data(), p.m, p.columns(), out_stride, p.dtype, device};
  const TestStream stream(device);
  ProductRun result;
  const auto run = [&](auto bytes, auto operation, const auto& args) {
    result.workspace_bytes = bytes(args);
    const std::vector<uint8_t> fill(static_cast<size_t>(result.workspace_bytes), in_workspace);
    DeviceArray<uint8_t> workspace(device, std::span<const uint8_t>(fill));
    operation(args, Workspace{workspace.data(), workspace.size()}, stream.get());
    stream.synchronize();
    workspace.expect_guards_intact();
  };
  if (p.transposed) {
    const MatmulTransposedArgs args{a_view, weight.view(), out_view};
    run(matmul_4bit_transposed_workspace_bytes, matmul_4bit_transposed, args);
  } else {
    MatmulArgs args{a_view, weight.view(), {}, out_view};
    if (p.has_bias) args.bias = {bias.data(), p.columns(), p.dtype, device};
    run(matmul_4bit_workspace_bytes, matmul_4bit, args);
  }
  out.expect_guards_intact();

  const std::vector<uint8_t> bytes = out.to_host();
  const int64_t width = size_bytes(p.dtype);
  for (int64_t row = 0; row < p.m; ++row) {
    const auto begin = bytes.begin() + row * out_stride * width;
    result.out.insert(result.out.end(), begin, begin + p.columns() * width);
    for (int64_t i = p.columns() * width; i < out_stride * width; ++i) {
      EXPECT_EQ(begin[i], 0xff) << "padding of row " << row << " was written to";
    }
  }
  return result;
}

std::vector<double> run_product(Device device, const Product& p, const ProductInputs& inputs) {
  return from_bytes(p.dtype, run_product_in(0xff, device, p, inputs).out);
}

}  // namespace qlora_native::testing
