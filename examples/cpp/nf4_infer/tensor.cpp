#include "tensor.h"

#include <cmath>

namespace llama {

Matrix rms_norm(const Matrix& x, const std::vector<float>& weight, float epsilon) {
  Matrix result(x.rows, x.cols);
  for (int64_t r = 0; r < x.rows; ++r) {
    const float* const in = x.row(r);
    double sum = 0;
    for (int64_t c = 0; c < x.cols; ++c) sum += static_cast<double>(in[c]) * in[c];
    const auto mean = static_cast<float>(sum / static_cast<double>(x.cols));
    const float scale = 1.0f / std::sqrt(mean + epsilon);
    float* const out = result.row(r);
    for (int64_t c = 0; c < x.cols; ++c) out[c] = in[c] * scale * weight[static_cast<size_t>(c)];
  }
  return result;
}

void add(Matrix& x, const Matrix& y) {
  for (size_t i = 0; i < x.values.size(); ++i) x.values[i] += y.values[i];
}

void silu_and_multiply(Matrix& gate, const Matrix& up) {
  for (size_t i = 0; i < gate.values.size(); ++i) {
    const float x = gate.values[i];
    gate.values[i] = x / (1.0f + std::exp(-x)) * up.values[i];
  }
}

}  // namespace llama
