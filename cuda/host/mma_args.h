// What the tensor-core products with small M share on the host: which arguments they take, and the
// values for their tables.
#pragma once

#include <cstdint>
#include <string>

#include "qlora_native/codebook.h"
#include "qlora_native/dtype.h"
#include "qlora_native/matmul.h"

namespace qlora_native::cuda {

/// Whether x, w and y suit kernels that take K in units of 64 elements with one scale each, by
/// 16-byte accesses: 16-bit x, K a multiple of 64, blocks of 64 or more, aligned rows of x, `packed`
/// aligned to 16 bytes, at most `max_rows` rows of x. If not, says why in `*why_not`.
bool supports_mma(const MatmulArgs& args, int64_t max_rows, std::string* why_not);

/// The codebook's values as a table of a 16-bit type wants them.
struct TableValues {
  float values[16];     ///< times the scale
  float scale_inverse;  ///< what a product with them is multiplied by
};

/// Scales NF4 for bfloat16: its values lose 0.08% (root of the mean square over normal weights,
/// relative) by rounding when multiplied by 1.43675 first, and 0.14% as they are. The scale was
/// found by trying [1, 2) in steps of 1/4000. Everything else is left as it is.
TableValues table_values(const Codebook& codebook, DType dtype);

}  // namespace qlora_native::cuda
