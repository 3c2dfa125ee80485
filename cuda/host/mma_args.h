// Which arguments the tensor-core products take.
#pragma once

#include <cstdint>
#include <string>

#include "qlora_native/matmul.h"

namespace qlora_native::cuda {

/// Whether activations and a weight suit kernels that take its rows in units of 64 elements with one scale
/// each, by 16-byte accesses: 16-bit activations with aligned rows, K a multiple of 64, blocks of 64 or more,
/// `packed` aligned to 16 bytes. If not, says why in `*why_not`.
bool suits_tensor_cores(const MatrixView& activations, const QuantizedView& weight,
                        std::string* why_not);

/// Whether tables hold the codebook's values in fewer bits without harm. If not, says why in `*why_not`.
bool suits_tables(const Codebook& codebook, std::string* why_not);

/// Both, and at most `max_rows` rows of x.
bool supports_mma(const MatmulArgs& args, int64_t max_rows, std::string* why_not);

}  // namespace qlora_native::cuda
