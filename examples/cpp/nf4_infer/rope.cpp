#include "rope.h"

#include <cmath>
#include <numbers>

namespace llama {
namespace {

float scaled(float frequency, const RopeConfig& rope) {
  if (!rope.llama3) return frequency / static_cast<float>(rope.linear_factor);
  const auto& [factor, low, high, positions] = *rope.llama3;
  const double wavelength = 2 * std::numbers::pi / frequency;
  if (wavelength < positions / high) return frequency;
  const double stretched = frequency / factor;
  if (wavelength > positions / low) return static_cast<float>(stretched);
  const double share = (positions / wavelength - low) / (high - low);
  return static_cast<float>((1 - share) * stretched + share * frequency);
}

}  // namespace

Rope::Rope(const Config& config) : half_(config.head_dim / 2) {
  for (int64_t i = 0; i < half_; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.head_dim);
    const float frequency = 1.0f / std::pow(static_cast<float>(config.rope.theta), exponent);
    frequencies_.push_back(scaled(frequency, config.rope));
  }
}

void Rope::rotate(float* heads, int64_t head_count, int64_t position) const {
  for (int64_t i = 0; i < half_; ++i) {
    const float angle = static_cast<float>(position) * frequencies_[static_cast<size_t>(i)];
    const float cosine = std::cos(angle), sine = std::sin(angle);
    for (int64_t head = 0; head < head_count; ++head) {
      float* const first = heads + head * 2 * half_ + i;
      float* const second = first + half_;
      const float x = *first, y = *second;
      *first = x * cosine - y * sine;
      *second = y * cosine + x * sine;
    }
  }
}

}  // namespace llama
