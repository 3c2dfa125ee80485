// Factors of adapters as the tensor-core kernels of cuda/lora read them: 16-bit, padded with zeros,
// what is summed over contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "qlora_native/views.h"

namespace qlora_native::cuda {

/// A factor [rows, cols], or its transpose, as a matrix of `padded_rows` x `padded_cols` of a 16-bit
/// dtype.
struct FactorUse {
  MatrixView factor;
  bool transposed;  ///< the matrix has the factor's columns as its rows
  int64_t padded_rows;
  int64_t padded_cols;  ///< a multiple of eight
  DType dtype;

  /// Whether the factor can be read where it lies.
  bool is_ready() const;
  int64_t workspace_bytes() const;
};

/// The matrix: the factor itself, or a copy in `workspace` that is made by one launch. Rows are
/// aligned to 16 bytes.
MatrixView prepare_factor(const FactorUse& use, Workspace workspace, cudaStream_t stream);

}  // namespace qlora_native::cuda
