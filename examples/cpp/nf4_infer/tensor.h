// A matrix of activations, and the two small operations on its rows.
#pragma once

#include <qlora_native/views.h>

#include <cstdint>
#include <vector>

namespace llama {

/// Row-major fp32; a row per token.
struct Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<float> values;

  Matrix() = default;
  Matrix(int64_t rows, int64_t cols)
      : rows(rows), cols(cols), values(static_cast<size_t>(rows * cols)) {}

  float* row(int64_t index) { return values.data() + index * cols; }
  const float* row(int64_t index) const { return values.data() + index * cols; }

  /// As the library's operations take it: they read and write the caller's memory.
  qlora_native::MatrixView view() const {
    return {values.data(), rows, cols, cols, qlora_native::DType::kFloat32, {}};
  }
  qlora_native::MutableMatrixView view() {
    return {values.data(), rows, cols, cols, qlora_native::DType::kFloat32, {}};
  }
};

/// Each row x becomes x / sqrt(mean(x^2) + epsilon) * weight.
Matrix rms_norm(const Matrix& x, const std::vector<float>& weight, float epsilon);

/// x += y.
void add(Matrix& x, const Matrix& y);

/// gate = silu(gate) * up, the gate of a SwiGLU.
void silu_and_multiply(Matrix& gate, const Matrix& up);

}  // namespace llama
