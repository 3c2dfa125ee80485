// Which arguments the tensor-core products with small M take.
#pragma once

#include <cstdint>
#include <string>

#include "qlora_native/matmul.h"

namespace qlora_native::cuda {

/// Whether x, w and y suit kernels that take K in units of 64 elements with one scale each, by
/// 16-byte accesses: 16-bit x, a named codebook, K a multiple of 64, blocks of 64 or more, aligned rows of x, `packed`
/// aligned to 16 bytes, at most `max_rows` rows of x. If not, says why in `*why_not`.
bool supports_mma(const MatmulArgs& args, int64_t max_rows, std::string* why_not);

}  // namespace qlora_native::cuda
