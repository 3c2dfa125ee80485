// Non-owning views of the caller's arrays. A view says where the elements are, how many, of what
// type and on which device; the memory stays the caller's and must outlive the call (on CUDA: until
// the work queued on the stream is done).
#pragma once

#include <cstdint>

#include "qlora_native/device.h"
#include "qlora_native/dtype.h"

namespace qlora_native {

/// `size` contiguous elements.
struct VectorView {
  const void* data = nullptr;
  int64_t size = 0;
  DType dtype = DType::kFloat32;
  Device device;
};

struct MutableVectorView {
  void* data = nullptr;
  int64_t size = 0;
  DType dtype = DType::kFloat32;
  Device device;
};

/// Row-major `rows` x `cols`; row r starts at element `r * row_stride`; elements of a row are
/// contiguous.
struct MatrixView {
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;  ///< in elements, >= cols
  DType dtype = DType::kFloat32;
  Device device;
};

struct MutableMatrixView {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;  ///< in elements, >= cols
  DType dtype = DType::kFloat32;
  Device device;
};

/// Scratch memory that the caller lends for one call, on the operation's device, aligned to 256
/// bytes.
/// `<op>_workspace_bytes` says how much an operation needs; nothing in it outlives the call.
struct Workspace {
  void* data = nullptr;
  int64_t size_bytes = 0;
};

}  // namespace qlora_native
