// Argument checks of the public operations: the only place that words such errors. Each throws
// InvalidArgument with the values in the message, before anything is written.
#pragma once

#include "qlora_native/dequantize.h"
#include "qlora_native/matmul.h"
#include "qlora_native/quantize.h"

namespace qlora_native {

void validate(const QuantizeArgs& args);
void validate(const DequantizeArgs& args);
void validate(const MatmulArgs& args);
void validate(const MatmulTransposedArgs& args);

}  // namespace qlora_native
