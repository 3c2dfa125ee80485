#include "verify.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace qn_bench {
namespace {

namespace qn = qlora_native;

constexpr int64_t kSampledBlocks = 4096;
constexpr int64_t kSampledOutputs = 64;

float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/// A quantized weight on the host, decoded element by element.
class HostWeight {
 public:
  explicit HostWeight(const Problem& problem)
      : view_(problem.quantized().view()),
        packed_(problem.quantized().packed.to_host<uint8_t>(qn::packed_bytes(view_.numel()))),
        codes_(problem.quantized().codes.to_host<uint8_t>(num_blocks())),
        absmax2_(problem.quantized().absmax2.to_host<float>(qn::num_groups(num_blocks()))),
        offset_(problem.quantized().offset.to_host<float>(1).front()) {}

  int64_t num_blocks() const { return qn::num_blocks(view_.numel(), view_.block_size); }
  int64_t block_size() const { return view_.block_size; }
  uint8_t code(int64_t element) const {
    const uint8_t byte = packed_[static_cast<size_t>(element / 2)];
    return element % 2 == 0 ? qn::first_nibble(byte) : qn::second_nibble(byte);
  }
  float absmax(int64_t block) const {
    const uint8_t code = codes_[static_cast<size_t>(block)];
    const float product =
        qn::kSignedDynamicMap.values[code] * absmax2_[static_cast<size_t>(block / qn::kGroupSize)];
    // Stored, so that no compiler makes one rounding of the two.
    volatile float rounded = product;
    return rounded + offset_;
  }
  float value(int64_t element) const {
    return view_.codebook.values[code(element)] * absmax(element / view_.block_size);
  }
  const qn::Codebook& codebook() const { return view_.codebook; }

 private:
  qn::QuantizedView view_;
  std::vector<uint8_t> packed_;
  std::vector<uint8_t> codes_;
  std::vector<float> absmax2_;
  float offset_;
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

/// Compares sampled outputs [m, outputs] with sums in fp64; `weight_at(output, i)` is the factor of
/// activation i of a row.
template <class WeightAt>
std::string check_product(const Problem& problem, int64_t m, int64_t outputs, int64_t depth,
                          WeightAt weight_at) {
  const std::vector<uint16_t> x = problem.activations().to_host<uint16_t>(m * depth);
  const std::vector<uint16_t> y = problem.output().to_host<uint16_t>(m * outputs);
  const std::vector<int64_t> rows = spread(m, 4);
  for (const int64_t output : spread(outputs, kSampledOutputs)) {
    for (const int64_t row : rows) {
      double sum = 0;
      double magnitude = 0;
      for (int64_t i = 0; i < depth; ++i) {
        const double term =
            static_cast<double>(from_bf16(x[static_cast<size_t>(row * depth + i)])) *
            weight_at(output, i);
        sum += term;
        magnitude += std::abs(term);
      }
      const double got = from_bf16(y[static_cast<size_t>(row * outputs + output)]);
      // One rounding to bf16, and sums that round the weight to bf16 or add up in fp32.
      const double limit = std::abs(sum) / 128 + magnitude / 2048;
      if (!(std::abs(got - sum) <= limit)) return wrong("output", row * outputs + output, got, sum);
    }
  }
  return "";
}

}  // namespace

std::string check_quantized(const Problem& problem) {
  const HostWeight weight(problem);
  const int64_t numel = problem.shape().n * problem.shape().k;
  const std::vector<uint16_t> dense = problem.dense().to_host<uint16_t>(numel);
  for (const int64_t block : spread(weight.num_blocks(), kSampledBlocks)) {
    const int64_t begin = block * weight.block_size();
    const int64_t end = std::min(numel, begin + weight.block_size());
    float absmax = 0;
    for (int64_t e = begin; e < end; ++e) {
      absmax = std::max(absmax, std::abs(from_bf16(dense[static_cast<size_t>(e)])));
    }
    const float inverse = absmax > 0 ? 1 / absmax : 0;
    for (int64_t e = begin; e < end; ++e) {
      const uint8_t expected =
          qn::encode_4bit(weight.codebook(), from_bf16(dense[static_cast<size_t>(e)]) * inverse);
      if (weight.code(e) != expected) return wrong("code", e, weight.code(e), expected);
    }
    // Eight bits and a sign for the distance from the mean leave this much.
    if (!(std::abs(weight.absmax(block) - absmax) <= 0.05f * absmax + 1e-6f)) {
      return wrong("absmax", block, weight.absmax(block), absmax);
    }
  }
  return "";
}

std::string check_dequantized(const Problem& problem) {
  const HostWeight weight(problem);
  const int64_t numel = problem.shape().n * problem.shape().k;
  const std::vector<uint16_t> output = problem.output().to_host<uint16_t>(numel);
  for (const int64_t block : spread(weight.num_blocks(), kSampledBlocks)) {
    const int64_t begin = block * weight.block_size();
    for (int64_t e = begin; e < std::min(numel, begin + weight.block_size()); ++e) {
      const uint16_t expected = to_bf16(weight.value(e));
      const uint16_t got = output[static_cast<size_t>(e)];
      if (got != expected) return wrong("element", e, from_bf16(got), from_bf16(expected));
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

}  // namespace qn_bench
