#include "reference.h"

#include <algorithm>
#include <cmath>

namespace bench {
namespace {

namespace qn = qlora_native;

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

}  // namespace

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

void ExpectedSum::add(double term) {
  sum_ += term;
  magnitude_ += std::abs(term);
  squares_ += term * term;
}

bool ExpectedSum::allows(double got) const {
  const Tolerance tolerance = tolerance_of(dtype_);
  // Of a short sum the roundings do not cancel out.
  const double roundings =
      std::max(magnitude_ * tolerance.of_magnitude, std::sqrt(squares_) * tolerance.of_root);
  return std::abs(got - sum_) <= std::abs(sum_) * tolerance.of_sum + roundings;
}

}  // namespace bench
