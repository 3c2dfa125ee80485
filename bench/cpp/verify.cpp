#include "verify.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "elements.h"
#include "reference.h"

namespace bench {
namespace {

namespace qn = qlora_native;

constexpr int64_t kSampledBlocks = 4096;
constexpr int64_t kSampledOutputs = 64;
constexpr int64_t kSampledRows = 9;

/// Compares sampled outputs [m, outputs] with sums in fp64; `weight_at(output, i)` is the factor of
/// activation i of a row.
template <class WeightAt>
std::string check_product(const Problem& problem, int64_t m, int64_t outputs, int64_t depth,
                          WeightAt weight_at) {
  const HostArray x(problem.activations(), m * depth, problem.dtype());
  const HostArray y(problem.output(), m * outputs, problem.dtype());
  const std::vector<int64_t> rows = spread(m, kSampledRows);
  std::vector<double> factors(static_cast<size_t>(depth));
  for (const int64_t output : spread(outputs, kSampledOutputs)) {
    for (int64_t i = 0; i < depth; ++i) factors[static_cast<size_t>(i)] = weight_at(output, i);
    for (const int64_t row : rows) {
      ExpectedSum sum(problem.dtype());
      for (int64_t i = 0; i < depth; ++i) {
        sum.add(x[row * depth + i] * factors[static_cast<size_t>(i)]);
      }
      const int64_t index = row * outputs + output;
      if (!sum.allows(y[index])) return wrong("output", index, y[index], sum.value());
    }
  }
  return "";
}

}  // namespace

std::string check_quantized(const Problem& problem) {
  const HostWeight weight(problem);
  const int64_t numel = problem.shape().n * problem.shape().k;
  const HostArray dense(problem.dense(), numel, problem.dtype());
  for (const int64_t block : spread(weight.num_blocks(), kSampledBlocks)) {
    const int64_t begin = block * weight.block_size();
    const int64_t end = std::min(numel, begin + weight.block_size());
    float absmax = 0;
    for (int64_t e = begin; e < end; ++e) {
      absmax = std::max(absmax, std::abs(dense[e]));
    }
    const float inverse = absmax > 0 ? 1 / absmax : 0;
    for (int64_t e = begin; e < end; ++e) {
      const uint8_t expected = qn::encode_4bit(weight.codebook(), dense[e] * inverse);
      if (weight.code(e) != expected) return wrong("code", e, weight.code(e), expected);
    }
    // Eight bits and a sign for the distance from the mean leave this much.
    const float slack = weight.is_double() ? 0.05f * absmax + 1e-6f : 0.0f;
    if (!(std::abs(weight.absmax(block) - absmax) <= slack)) {
      return wrong("absmax", block, weight.absmax(block), absmax);
    }
  }
  return "";
}

std::string check_dequantized(const Problem& problem) {
  const HostWeight weight(problem);
  const int64_t numel = problem.shape().n * problem.shape().k;
  const HostArray output(problem.output(), numel, problem.dtype());
  for (const int64_t block : spread(weight.num_blocks(), kSampledBlocks)) {
    const int64_t begin = block * weight.block_size();
    for (int64_t e = begin; e < std::min(numel, begin + weight.block_size()); ++e) {
      const double expected = weight.value(e);
      const double got = output[e];
      if (!(std::abs(got - expected) <= half_ulp(expected, problem.dtype()))) {
        return wrong("element", e, got, expected);
      }
    }
  }
  return "";
}

std::string check_matmul(const Problem& problem, int64_t m) {
  const HostWeight weight(problem);
  const auto [n, k] = problem.shape();
  return check_product(problem, m, n, k,
                       [&, k = k](int64_t row, int64_t i) { return weight.value(row * k + i); });
}

std::string check_matmul_transposed(const Problem& problem, int64_t m) {
  const HostWeight weight(problem);
  const auto [n, k] = problem.shape();
  return check_product(problem, m, k, n, [&, k = k](int64_t column, int64_t i) {
    return weight.value(i * k + column);
  });
}

}  // namespace bench
