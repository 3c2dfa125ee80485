// Values of a codebook for tables of a 16-bit type. Pure host arithmetic, no CUDA header.
#pragma once

#include "qlora_native/codebook.h"
#include "qlora_native/dtype.h"

namespace qlora_native::cuda {

struct TableValues {
  float values[16];     ///< of the codes, times a scale
  float scale_inverse;  ///< what a block's scale is multiplied by
};

/// Whether `table_values` knows a scale with which the codebook's values lose less in 16 bits than
/// decoded weights do: for all named ones.
bool has_table_values(const Codebook& codebook);

/// INT4 times 7 and FP4 times 12 are small integers and halves: nothing is lost. NF4 loses 0.078%
/// in bfloat16 (root of the mean square over normal weights, relative; 0.136% unscaled, 0.165% for
/// decoded weights) and 0.0086% in float16. Its scales were found by trying [1, 2) in steps of
/// 1/4000.
TableValues table_values(const Codebook& codebook, DType dtype);

}  // namespace qlora_native::cuda
