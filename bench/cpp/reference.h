// What checks compare with: a weight decoded by its definition, and sums in fp64.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "problem.h"

namespace bench {

/// A quantized weight on the host, decoded element by element.
class HostWeight {
 public:
  explicit HostWeight(const Problem& problem)
      : view_(problem.quantized().view()),
        packed_(
            problem.quantized().packed.to_host<uint8_t>(qlora_native::packed_bytes(view_.numel()))),
        absmax_(problem.quantized().absmax.to_host<float>(is_double() ? 0 : num_blocks())),
        codes_(problem.quantized().codes.to_host<uint8_t>(is_double() ? num_blocks() : 0)),
        absmax2_(problem.quantized().absmax2.to_host<float>(
            is_double() ? qlora_native::num_groups(num_blocks()) : 0)),
        offset_(problem.quantized().offset.to_host<float>(is_double() ? 1 : 0)) {}

  int64_t num_blocks() const { return qlora_native::num_blocks(view_.numel(), view_.block_size); }
  int64_t block_size() const { return view_.block_size; }
  bool is_double() const { return view_.absmax.is_double_quantized(); }
  uint8_t code(int64_t element) const {
    const uint8_t byte = packed_[static_cast<size_t>(element / 2)];
    return element % 2 == 0 ? qlora_native::first_nibble(byte) : qlora_native::second_nibble(byte);
  }
  float absmax(int64_t block) const {
    if (!is_double()) return absmax_[static_cast<size_t>(block)];
    const uint8_t code = codes_[static_cast<size_t>(block)];
    const float product = qlora_native::kSignedDynamicMap.values[code] *
                          absmax2_[static_cast<size_t>(block / qlora_native::kGroupSize)];
    // Stored, so that no compiler makes one rounding of the two.
    volatile float rounded = product;
    return rounded + offset_.front();
  }
  float value(int64_t element) const {
    return view_.codebook.values[code(element)] * absmax(element / view_.block_size);
  }
  const qlora_native::Codebook& codebook() const { return view_.codebook; }

 private:
  qlora_native::QuantizedView view_;
  std::vector<uint8_t> packed_;
  std::vector<float> absmax_;
  std::vector<uint8_t> codes_;
  std::vector<float> absmax2_;
  std::vector<float> offset_;
};

/// About `wanted` numbers from [0, size), evenly spread, the first and the last among them.
std::vector<int64_t> spread(int64_t size, int64_t wanted);

/// "<what> <index> is <got>, expected <expected>".
std::string wrong(const char* what, int64_t index, double got, double expected);

/// A sum of products in fp64, and how far a kernel's may be off.
class ExpectedSum {
 public:
  explicit ExpectedSum(qlora_native::DType dtype) : dtype_(dtype) {}

  void add(double term);
  double value() const { return sum_; }
  bool allows(double got) const;

 private:
  qlora_native::DType dtype_;
  double sum_ = 0;
  double magnitude_ = 0;
  double squares_ = 0;
};

}  // namespace bench
