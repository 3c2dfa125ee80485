// Argument checks of the public operations: the only place that words such errors. Each throws
// InvalidArgument with the values in the message, before anything is written.
#pragma once

#include "qlora_native/codebook.h"
#include "qlora_native/dequantize.h"
#include "qlora_native/grouped_matmul.h"
#include "qlora_native/lora.h"
#include "qlora_native/matmul.h"
#include "qlora_native/optimizer.h"
#include "qlora_native/quantize.h"

namespace qlora_native {

void validate(const QuantizeArgs& args);
void validate(const DequantizeArgs& args);
void validate(const MatmulArgs& args);
void validate(const MatmulTransposedArgs& args);
void validate(const GroupedMatmulArgs& args);
void validate(const GroupedMatmulTransposedArgs& args);
void validate(const OptimizerStepArgs& args);
void validate(const GradientNormArgs& args);
void validate(const LoraProjectArgs& args);
void validate(const LoraUpdateArgs& args);
void validate(const LoraGradientArgs& args);
void validate(const LoraForwardArgs& args);
void validate(const LoraBackwardArgs& args);

/// The parts of those checks that need no arrays; `op` begins the message.
void validate(const char* op, const Codebook& book);
void validate(const char* op, int64_t rows, int64_t cols, int64_t block_size);

}  // namespace qlora_native
