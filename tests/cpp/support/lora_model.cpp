#include "support/lora_model.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <ostream>

#include "support/device_array.h"
#include "support/problem.h"

namespace qlora_native::testing {
namespace {

size_t at(int64_t row, int64_t col, int64_t cols) { return static_cast<size_t>(row * cols + col); }

/// Philox4x32-10 as its paper writes it: ten rounds of two 32 x 32 bit products, keys that are
/// raised between them.
std::array<uint32_t, 4> philox_reference(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  for (int round = 0; round < 10; ++round) {
    if (round > 0) {
      k[0] += 0x9E3779B9;
      k[1] += 0xBB67AE85;
    }
    const uint64_t a = static_cast<uint64_t>(c[0]) * 0xD2511F53;
    const uint64_t b = static_cast<uint64_t>(c[2]) * 0xCD9E8D57;
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
  }
  return c;
}

uint32_t low_half(uint64_t x) { return static_cast<uint32_t>(x); }
uint32_t high_half(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

double threshold_of(const Dropout& dropout) { return std::round(65536.0 * dropout.p); }

/// An array of rows on the device, poisoned between them.
struct StridedMatrix {
  int64_t rows, cols, stride;
  DType dtype;
  DeviceArray<uint8_t> bytes;

  StridedMatrix(Device device, DType dtype_, int64_t rows_, int64_t cols_, int64_t padding,
                const std::vector<double>& values)
      : rows(rows_),
        cols(cols_),
        stride(cols_ + padding),
        dtype(dtype_),
        bytes(device, std::span<const uint8_t>(padded(values))) {}

  MatrixView view(Device device) { return {bytes.data(), rows, cols, stride, dtype, device}; }
  MutableMatrixView mutable_view(Device device) {
    return {bytes.data(), rows, cols, stride, dtype, device};
  }

  std::vector<double> to_host() const {
    bytes.expect_guards_intact();
    const std::vector<uint8_t> all = bytes.to_host();
    const int64_t width = size_bytes(dtype);
    std::vector<uint8_t> dense;
    for (int64_t row = 0; row < rows; ++row) {
      const auto begin = all.begin() + row * stride * width;
      dense.insert(dense.end(), begin, begin + cols * width);
      for (int64_t i = cols * width; i < stride * width; ++i) {
        EXPECT_EQ(begin[i], 0xff) << "padding of row " << row << " was written to";
      }
    }
    return from_bytes(dtype, dense);
  }

 private:
  /// No values: all poison.
  std::vector<uint8_t> padded(const std::vector<double>& values) const {
    std::vector<uint8_t> all(static_cast<size_t>(rows * stride * size_bytes(dtype)), 0xff);
    const std::vector<uint8_t> dense = to_bytes(dtype, values);
    const int64_t row_bytes = cols * size_bytes(dtype);
    for (int64_t row = 0; row < rows && !values.empty(); ++row) {
      std::copy_n(dense.begin() + row * row_bytes, row_bytes,
                  all.begin() + row * stride * size_bytes(dtype));
    }
    return all;
  }
};

}  // namespace

int64_t LoraProblem::parameter_rows() const {
  if (op == Op::kLoraUpdate) return transposed ? r : c;
  return transposed ? c : r;
}

int64_t LoraProblem::parameter_cols() const { return r + c - parameter_rows(); }

std::ostream& operator<<(std::ostream& out, const LoraProblem& p) {
  return out << name(p.op) << " M " << p.m << " r " << p.r << " C " << p.c
             << (p.transposed ? " transposed " : " ") << name(p.dtype) << '/'
             << name(p.parameter_dtype) << " p " << p.dropout.p;
}

bool is_kept(const Dropout& dropout, int64_t cols, int64_t row, int64_t col) {
  const auto block = static_cast<uint64_t>(row * ((cols + 7) / 8) + col / 8);
  const std::array<uint32_t, 4> words = philox_reference(
      {low_half(block), high_half(block), low_half(dropout.offset), high_half(dropout.offset)},
      {low_half(dropout.seed), high_half(dropout.seed)});
  const uint32_t word = words[static_cast<size_t>(col % 8 / 2)];
  return (col % 2 == 0 ? word % 65536 : word / 65536) >= threshold_of(dropout);
}

double dropout_scale(const Dropout& dropout) {
  const double kept = 1.0 - threshold_of(dropout) / 65536.0;
  return kept > 0 ? 1.0 / kept : 0.0;
}

LoraInputs make_inputs(const LoraProblem& p, uint32_t seed) {
  LoraInputs inputs;
  inputs.high = gaussian(p.m * p.c, p.dtype, seed);
  if (p.op != Op::kLoraProject) inputs.low = gaussian(p.m * p.r, p.dtype, seed + 1);
  if (!p.is_gradient()) {
    inputs.factor = gaussian(p.parameter_rows() * p.parameter_cols(), p.parameter_dtype, seed + 2);
  }
  return inputs;
}

LoraInputs identity_inputs(const LoraProblem& p) {
  EXPECT_EQ(p.r, p.is_gradient() ? p.m : p.c);
  LoraInputs inputs;
  const auto identity = [](int64_t size) {
    std::vector<double> values(static_cast<size_t>(size * size));
    for (int64_t i = 0; i < size; ++i) values[at(i, i, size)] = 1.0;
    return values;
  };
  if (p.is_gradient()) {
    inputs.low = identity(p.m);
  } else {
    inputs.factor = identity(p.c);
    inputs.low.assign(static_cast<size_t>(p.m * p.r), 1.0);
  }
  inputs.high.assign(static_cast<size_t>(p.m * p.c), p.op == Op::kLoraUpdate ? 0.0 : 1.0);
  return inputs;
}

LoraReference reference(const LoraProblem& p, const LoraInputs& inputs) {
  const double scale = p.scaling * dropout_scale(p.dropout);
  const auto kept = [&](int64_t row, int64_t col) { return is_kept(p.dropout, p.c, row, col); };
  // F [c, r], rounded as the activations are.
  const auto factor = [&](int64_t col, int64_t j) {
    const bool is_rank_first = (p.op == Op::kLoraUpdate) == p.transposed;
    const double value = inputs.factor[is_rank_first ? at(j, col, p.c) : at(col, j, p.r)];
    return round_to(p.dtype, value);
  };
  LoraReference out;
  const auto append = [&](double before, double sum, double magnitude, int64_t depth) {
    out.exact.push_back(before + sum * scale);
    const double roundings = 8 + 2 * std::sqrt(static_cast<double>(depth));
    out.tolerance.push_back(unit_roundoff(DType::kFloat32) * roundings *
                            (std::fabs(before) + magnitude * std::fabs(scale)));
  };
  if (p.is_gradient()) {
    for (int64_t i = 0; i < p.r * p.c; ++i) {
      const int64_t j = p.transposed ? i % p.r : i / p.c;
      const int64_t col = p.transposed ? i / p.r : i % p.c;
      double sum = 0;
      double magnitude = 0;
      for (int64_t row = 0; row < p.m; ++row) {
        // What is dropped is zero, whatever it was; what it is multiplied by counts.
        const double v = kept(row, col) ? inputs.high[at(row, col, p.c)] : 0.0;
        const double term = inputs.low[at(row, j, p.r)] * v;
        sum += term;
        magnitude += std::fabs(term);
      }
      append(0, sum, magnitude, p.m);
    }
    return out;
  }
  const bool is_update = p.op == Op::kLoraUpdate;
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t i = 0; i < (is_update ? p.c : p.r); ++i) {
      double sum = 0;
      double magnitude = 0;
      for (int64_t d = 0; d < (is_update ? p.r : p.c); ++d) {
        const double left = is_update ? inputs.low[at(row, d, p.r)]
                                      : (kept(row, d) ? inputs.high[at(row, d, p.c)] : 0.0);
        const double term = left * (is_update ? factor(i, d) : factor(d, i));
        sum += term;
        magnitude += std::fabs(term);
      }
      if (is_update && !kept(row, i)) sum = magnitude = 0;
      append(is_update ? inputs.high[at(row, i, p.c)] : 0.0, sum, magnitude, is_update ? p.r : p.c);
    }
  }
  return out;
}

std::vector<double> run_on(Device device, const LoraProblem& p, const LoraInputs& inputs) {
  StridedMatrix low(device, p.dtype, p.m, p.r, p.low_padding, inputs.low);
  StridedMatrix high(device, p.dtype, p.m, p.c, p.high_padding, inputs.high);
  StridedMatrix parameter(device, p.parameter_dtype, p.parameter_rows(), p.parameter_cols(),
                          p.parameter_padding, inputs.factor);
  const TestStream stream(device);
  const auto run = [&](const auto& args, auto workspace_bytes, auto operation) {
    DeviceArray<uint8_t> workspace(device, workspace_bytes(args));
    operation(args, Workspace{workspace.data(), workspace.size()}, stream.get());
    stream.synchronize();
    workspace.expect_guards_intact();
  };
  if (p.op == Op::kLoraProject) {
    run(LoraProjectArgs{high.view(device), parameter.view(device), p.transposed, p.scaling,
                        p.dropout, low.mutable_view(device)},
        lora_project_workspace_bytes, lora_project);
    return low.to_host();
  }
  if (p.op == Op::kLoraUpdate) {
    run(LoraUpdateArgs{low.view(device), parameter.view(device), p.transposed, p.scaling, p.dropout,
                       high.mutable_view(device)},
        lora_update_workspace_bytes, lora_update);
    return high.to_host();
  }
  run(LoraGradientArgs{low.view(device), high.view(device), p.scaling, p.dropout, p.transposed,
                       parameter.mutable_view(device)},
      lora_gradient_workspace_bytes, lora_gradient);
  return parameter.to_host();
}

}  // namespace qlora_native::testing
