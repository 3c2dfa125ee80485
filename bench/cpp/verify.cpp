#include "verify.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "elements.h"

namespace bench {
namespace {

namespace qn = qlora_native;

constexpr int64_t kSampledBlocks = 4096;
constexpr int64_t kSampledOutputs = 64;
constexpr int64_t kSampledRows = 9;

/// A quantized weight on the host, decoded element by element.
class HostWeight {
 public:
  explicit HostWeight(const Problem& problem)
      : view_(problem.quantized().view()),
        packed_(problem.quantized().packed.to_host<uint8_t>(qn::packed_bytes(view_.numel()))),
        absmax_(problem.quantized().absmax.to_host<float>(is_double() ? 0 : num_blocks())),
        codes_(problem.quantized().codes.to_host<uint8_t>(is_double() ? num_blocks() : 0)),
        absmax2_(problem.quantized().absmax2.to_host<float>(
            is_double() ? qn::num_groups(num_blocks()) : 0)),
        offset_(problem.quantized().offset.to_host<float>(is_double() ? 1 : 0)) {}

  int64_t num_blocks() const { return qn::num_blocks(view_.numel(), view_.block_size); }
  int64_t block_size() const { return view_.block_size; }
  bool is_double() const { return view_.absmax.is_double_quantized(); }
  uint8_t code(int64_t element) const {
    const uint8_t byte = packed_[static_cast<size_t>(element / 2)];
    return element % 2 == 0 ? qn::first_nibble(byte) : qn::second_nibble(byte);
  }
  float absmax(int64_t block) const {
    if (!is_double()) return absmax_[static_cast<size_t>(block)];
    const uint8_t code = codes_[static_cast<size_t>(block)];
    const float product =
        qn::kSignedDynamicMap.values[code] * absmax2_[static_cast<size_t>(block / qn::kGroupSize)];
    // Stored, so that no compiler makes one rounding of the two.
    volatile float rounded = product;
    return rounded + offset_.front();
  }
  float value(int64_t element) const {
    return view_.codebook.values[code(element)] * absmax(element / view_.block_size);
  }
  const qn::Codebook& codebook() const { return view_.codebook; }

 private:
  qn::QuantizedView view_;
  std::vector<uint8_t> packed_;
  std::vector<float> absmax_;
  std::vector<uint8_t> codes_;
  std::vector<float> absmax2_;
  std::vector<float> offset_;
};

/// About `wanted` numbers from [0, size), evenly spread, the first and the last among them.
std::vector<int64_t> spread(int64_t size, int64_t wanted) {
  const int64_t count = std::min(size, wanted);
  std::vector<int64_t> sample;
  for (int64_t i = 0; i < count; ++i)
    sample.push_back(i * (size - 1) / std::max<int64_t>(count - 1, 1));
  return sample;
}

std::string wrong(const char* what, int64_t index, double got, double expected) {
  return std::string(what) + " " + std::to_string(index) + " is " + std::to_string(got) +
         ", expected " + std::to_string(expected);
}

/// How far a product may be off: a part of its size, and a part of the sizes that were added up, or of
/// the root of their squares: eight deviations of roundings that are independent.
struct Tolerance {
  double of_sum;
  double of_magnitude;
  double of_root;
};

/// One rounding of the result, and sums in fp32 that may round the weight to the dtype (fp32: to
/// TF32) first.
Tolerance tolerance_of(qn::DType dtype) {
  switch (dtype) {
    case qn::DType::kFloat32:
      return {1e-5, 1.0 / 16384, 1.0 / 384};
    case qn::DType::kFloat16:
      return {1.0 / 1024, 1.0 / 4096, 1.0 / 384};
    default:
      return {1.0 / 128, 1.0 / 2048, 1.0 / 96};
  }
}

/// Compares sampled outputs [m, outputs] with sums in fp64; `weight_at(output, i)` is the factor of
/// activation i of a row.
template <class WeightAt>
std::string check_product(const Problem& problem, int64_t m, int64_t outputs, int64_t depth,
                          WeightAt weight_at) {
  const HostArray x(problem.activations(), m * depth, problem.dtype());
  const HostArray y(problem.output(), m * outputs, problem.dtype());
  const Tolerance tolerance = tolerance_of(problem.dtype());
  const std::vector<int64_t> rows = spread(m, kSampledRows);
  std::vector<double> factors(static_cast<size_t>(depth));
  for (const int64_t output : spread(outputs, kSampledOutputs)) {
    for (int64_t i = 0; i < depth; ++i) factors[static_cast<size_t>(i)] = weight_at(output, i);
    for (const int64_t row : rows) {
      double sum = 0;
      double magnitude = 0;
      double squares = 0;
      for (int64_t i = 0; i < depth; ++i) {
        const double term = x[row * depth + i] * factors[static_cast<size_t>(i)];
        sum += term;
        magnitude += std::abs(term);
        squares += term * term;
      }
      const double got = y[row * outputs + output];
      // Of a short sum the roundings do not cancel out.
      const double roundings =
          std::max(magnitude * tolerance.of_magnitude, std::sqrt(squares) * tolerance.of_root);
      const double limit = std::abs(sum) * tolerance.of_sum + roundings;
      if (!(std::abs(got - sum) <= limit)) return wrong("output", row * outputs + output, got, sum);
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
