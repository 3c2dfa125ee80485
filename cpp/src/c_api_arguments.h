// The C ABI's argument structs as the arguments of the C++ operations. Checked here is what C cannot
// express or the operations do not see: struct sizes, enum values, alignment, reserved members; the
// operations check the rest. Each throws InvalidArgument.
#pragma once

#include "qlora_native/c_api.h"
#include "qlora_native/c_api_grouped.h"
#include "qlora_native/c_api_lora.h"
#include "qlora_native/codebook.h"
#include "qlora_native/dequantize.h"
#include "qlora_native/device.h"
#include "qlora_native/grouped_matmul.h"
#include "qlora_native/lora.h"
#include "qlora_native/matmul.h"
#include "qlora_native/quantize.h"

namespace qlora_native::c_api {

// What conversions of several files need.
void check_alignment(const char* function, const char* what, const void* data, int64_t alignment);
void check_reserved(const char* function, const char* what, int32_t reserved);
bool to_bool(const char* function, const char* what, int32_t value);
DType to_dtype(const char* function, qn_dtype dtype);
Device to_device(const char* function, qn_device_type type, int32_t index);

/// `custom_values` must be there for kCustom and nowhere else. Does not look at its values.
Codebook to_codebook(const char* function, qn_quant_type type, const float* custom_values);

QuantizedView to_weight_view(const char* function, const char* what, const qn_weight* weight);

QuantizeArgs to_args(const char* function, const qn_quantize_args* args);
DequantizeArgs to_args(const char* function, const qn_dequantize_args* args);
MatmulArgs to_args(const char* function, const qn_matmul_args* args);
MatmulTransposedArgs to_args(const char* function, const qn_matmul_transposed_args* args);
// In c_api_lora.cpp.
LoraProjectArgs to_args(const char* function, const qn_lora_project_args* args);
LoraUpdateArgs to_args(const char* function, const qn_lora_update_args* args);
LoraGradientArgs to_args(const char* function, const qn_lora_gradient_args* args);
LoraForwardArgs to_args(const char* function, const qn_lora_forward_args* args);
LoraBackwardArgs to_args(const char* function, const qn_lora_backward_args* args);
GroupedMatmulArgs to_args(const char* function, const qn_grouped_matmul_args* args);
GroupedMatmulTransposedArgs to_args(const char* function,
                                    const qn_grouped_matmul_transposed_args* args);

Workspace to_workspace(const char* function, void* data, int64_t size_bytes);

}  // namespace qlora_native::c_api
