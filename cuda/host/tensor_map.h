// Descriptions of matrices for the tensor copy engine (device/tensor_copy.cuh).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace qlora_native::cuda {

/// A matrix of bytes or of 16-bit elements, and the box that one copy takes of it.
struct TensorBox {
  const void* data;      ///< aligned to 16 bytes
  int elem_bytes;        ///< 1 or 2
  int64_t rows;          ///< at least 1
  int64_t cols;          ///< at least 1
  int64_t stride_bytes;  ///< from a row to the next: a multiple of 16
  int box_rows;          ///< at most 256
  int box_cols;          ///< box_cols * elem_bytes is 64 or 128, and as much is swizzled
};

/// Makes the device's context the thread's, which make_tensor_map() needs: the runtime leaves that to the thread's first
/// launch where the device is the current one already.
void make_context_current(int device);

/// Throws CudaError when the driver refuses.
CUtensorMap make_tensor_map(const TensorBox& box);

}  // namespace qlora_native::cuda
