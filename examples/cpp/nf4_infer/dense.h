// Tensors that stayed in 16 or 32 bits: norms, biases, and often embeddings and the output head.
#pragma once

#include <qlora_native/safetensors.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tensor.h"

namespace llama {

/// A vector of the checkpoint as fp32. Throws when it is not there or not [size].
std::vector<float> load_vector(const qlora_native::SafetensorsCheckpoint& files,
                               const std::string& name, int64_t size);

/// A matrix that stays in its file, in its dtype.
class DenseMatrix {
 public:
  /// Throws when it is not there, not [rows, cols], or of another dtype than F32, F16 and BF16.
  DenseMatrix(const qlora_native::SafetensorsCheckpoint& files, const std::string& name,
              int64_t rows, int64_t cols);

  /// Row `index` as fp32 into `out` [cols].
  void read_row(int64_t index, float* out) const;

  /// x [m, cols] times the transposed matrix, into y [m, rows].
  void multiply(const Matrix& x, Matrix& y) const;

 private:
  void multiply_rows(const Matrix& x, Matrix& y, int64_t begin, int64_t end) const;

  const qlora_native::SafetensorsTensor& tensor_;
  qlora_native::DType dtype_;
};

}  // namespace llama
