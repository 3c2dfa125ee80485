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

}  // namespace qlora_native
