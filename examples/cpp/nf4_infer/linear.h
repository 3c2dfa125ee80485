// A linear layer, 4-bit or dense: the products of the library, as a program calls them.
#pragma once

#include <qlora_native/quantized_matrix.h>
#include <qlora_native/views.h>

#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "dense.h"
#include "tensor.h"

namespace llama {

/// The files of a model, and how its 4-bit matrices were quantized. Weights point into it.
struct Weights {
  qlora_native::SafetensorsCheckpoint files;
  qlora_native::QuantizationConfig quantization;
};

/// A matrix [rows, cols] of a model, as it is stored.
using Weight = std::variant<qlora_native::QuantizedMatrix, DenseMatrix>;
Weight load_weight(const Weights& weights, const std::string& name, int64_t rows, int64_t cols);

/// Memory that operations borrow for a call, aligned as they want it; one serves all layers.
class Scratch {
 public:
  /// At least `size_bytes` of it.
  qlora_native::Workspace get(int64_t size_bytes);

 private:
  static constexpr int64_t kAlignment = 256;
  std::vector<char> memory_;
};

class Linear {
 public:
  /// The weight NAME.weight [outputs, inputs] and, if there is one, the bias NAME.bias [outputs].
  Linear(const Weights& weights, const std::string& name, int64_t inputs, int64_t outputs);

  /// x [m, inputs] to [m, outputs].
  Matrix forward(const Matrix& x, Scratch& scratch) const;

 private:
  int64_t outputs_;
  Weight weight_;
  std::vector<float> bias_;
};

}  // namespace llama
