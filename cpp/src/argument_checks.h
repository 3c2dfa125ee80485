// What the checks of several operations ask of one argument. `op` begins the message, `what` names
// the argument.
#pragma once

#include <cstdint>
#include <string>

#include "qlora_native/quantized.h"
#include "qlora_native/views.h"
#include "validate.h"
#include "validation_failure.h"

namespace qlora_native {

/// Whose device the others have to be on, where there is a weight.
inline constexpr const char* kWeight = "the 4-bit weight";

inline void check_dtype(const char* op, const char* what, DType dtype) {
  const auto code = static_cast<int32_t>(dtype);
  if (code < 0 || code > static_cast<int32_t>(DType::kBFloat16)) {
    fail(op, ": ", what, " has an unknown dtype code ", code);
  }
}

inline void check_device(const char* op, const char* what, Device device, Device expected,
                         const char* expected_of) {
  if (device != expected) {
    fail(op, ": ", what, " is on ", to_string(device), ", ", expected_of, " on ",
         to_string(expected));
  }
}

inline void check_pointer(const char* op, const char* what, const void* data, int64_t size) {
  if (data == nullptr && size > 0) fail(op, ": ", what, " is null but has ", size, " elements");
}

inline void check_vector(const char* op, const char* what, const VectorView& view, int64_t size,
                         Device device, const char* device_of = kWeight) {
  check_dtype(op, what, view.dtype);
  if (view.size != size) fail(op, ": ", what, " has ", view.size, " elements, expected ", size);
  check_device(op, what, view.device, device, device_of);
  check_pointer(op, what, view.data, size);
}

/// That a matrix can be counted in bytes of the widest type, fp64: a workspace of its shape too.
inline void check_extent(const char* op, const char* what, int64_t rows, int64_t row_stride) {
  int64_t bytes = 0;
  if (__builtin_mul_overflow(rows, row_stride, &bytes) ||
      __builtin_mul_overflow(bytes, int64_t{8}, &bytes)) {
    fail(op, ": ", what, "'s ", rows, " rows at stride ", row_stride, " overflow 64 bits");
  }
}

inline void check_matrix(const char* op, const char* what, const MatrixView& view, Device device,
                         const char* device_of = kWeight) {
  check_dtype(op, what, view.dtype);
  if (view.rows < 0 || view.cols < 0) fail(op, ": ", what, " is ", view.rows, " x ", view.cols);
  if (view.row_stride < view.cols) {
    fail(op, ": ", what, " has row stride ", view.row_stride, ", less than its ", view.cols,
         " columns");
  }
  check_extent(op, what, view.rows, view.row_stride);
  check_device(op, what, view.device, device, device_of);
  check_pointer(op, what, view.data, view.rows * view.cols);
}

inline MatrixView as_const(const MutableMatrixView& view) {
  return {view.data, view.rows, view.cols, view.row_stride, view.dtype, view.device};
}

/// The rules common to a weight that is read and one that is written.
template <class View>
void check_quantized(const char* op, const View& weight) {
  validate(op, weight.rows, weight.cols, weight.block_size);
  validate(op, weight.codebook);
  const int64_t numel = weight.numel();
  check_pointer(op, "the packed weight", weight.packed, numel);
  const int64_t blocks = num_blocks(numel, weight.block_size);
  if (weight.absmax.is_double_quantized()) {
    if (weight.absmax.values != nullptr) {
      fail(op, ": absmax is given both as fp32 values and as 8-bit codes");
    }
    check_pointer(op, "absmax2", weight.absmax.absmax2, num_groups(blocks));
    check_pointer(op, "the offset of the double quantization", weight.absmax.offset, blocks);
  } else {
    check_pointer(op, "absmax", weight.absmax.values, blocks);
  }
}

}  // namespace qlora_native
