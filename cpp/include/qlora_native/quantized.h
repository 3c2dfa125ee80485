// A 4-bit matrix as it lies in memory.
//
// The elements are those of a row-major [rows, cols] matrix, taken as one flat sequence: element e
// is a nibble of byte e / 2 (even e: the high one), belongs to block e / block_size, and decodes to
//     codebook.values[code] * absmax(block)
// in fp32, rounded once to the output type. Blocks straddle rows when cols % block_size != 0; the
// last block may be short. All pointers are on `device`.
#pragma once

#include <cstdint>

#include "qlora_native/codebook.h"
#include "qlora_native/device.h"

namespace qlora_native {

/// The scale of every block: fp32 `values`, or, double-quantized, 8-bit `codes` with
///     absmax(b) = kSignedDynamicMap.values[codes[b]] * absmax2[b / 256] + *offset
/// as two fp32 operations, each rounded (never a fused multiply-add).
struct Absmax {
  const float* values = nullptr;   ///< [num_blocks]; null when double-quantized
  const uint8_t* codes = nullptr;  ///< [num_blocks]
  const float* absmax2 = nullptr;  ///< [num_groups]
  const float* offset = nullptr;   ///< one element: the mean of the finite absmax values

  constexpr bool is_double_quantized() const { return codes != nullptr; }
};

struct MutableAbsmax {
  float* values = nullptr;
  uint8_t* codes = nullptr;
  float* absmax2 = nullptr;
  float* offset = nullptr;

  constexpr bool is_double_quantized() const { return codes != nullptr; }
};

struct QuantizedView {
  const uint8_t* packed = nullptr;  ///< [packed_bytes(rows * cols)]
  Absmax absmax;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t block_size = 64;
  Codebook codebook = kNF4;
  Device device;

  constexpr int64_t numel() const { return rows * cols; }
};

struct MutableQuantizedView {
  uint8_t* packed = nullptr;
  MutableAbsmax absmax;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t block_size = 64;
  Codebook codebook = kNF4;
  Device device;

  constexpr int64_t numel() const { return rows * cols; }
};

/// `count` matrices of one shape and format, each quantized by itself: its own blocks, groups and
/// offset. A stride says how far the same part of the next matrix is.
struct QuantizedStackView {
  QuantizedView first;  ///< matrix 0
  int64_t count = 0;
  int64_t packed_stride = 0;   ///< in bytes, at least packed_bytes(rows * cols)
  int64_t absmax_stride = 0;   ///< in scales, fp32 or codes
  int64_t absmax2_stride = 0;  ///< in floats; with double quantization only, as the next
  int64_t offset_stride = 0;   ///< in floats

  /// Matrix `index`; `first` need not be there when there is none.
  constexpr QuantizedView operator[](int64_t index) const {
    QuantizedView matrix = first;
    matrix.packed += index * packed_stride;
    if (first.absmax.is_double_quantized()) {
      matrix.absmax.codes += index * absmax_stride;
      matrix.absmax.absmax2 += index * absmax2_stride;
      matrix.absmax.offset += index * offset_stride;
    } else {
      matrix.absmax.values += index * absmax_stride;
    }
    return matrix;
  }
};

}  // namespace qlora_native
