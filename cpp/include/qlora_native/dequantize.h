// Decoding of a 4-bit matrix to floats.
#pragma once

#include "qlora_native/export.h"
#include "qlora_native/quantized.h"
#include "qlora_native/stream.h"
#include "qlora_native/views.h"

namespace qlora_native {

struct DequantizeArgs {
  QuantizedView weight;
  MutableVectorView output;  ///< weight.numel() elements in row-major order: fp32, fp16 or bf16
};

/// output[e] = round(codebook.values[code(e)] * absmax(block(e))), the product in fp32.
/// Needs no workspace. Does not wait for `stream`; can be captured in a CUDA graph.
/// Throws InvalidArgument (before the output is touched), Unsupported, CudaError.
QN_API void dequantize_4bit(const DequantizeArgs& args, Stream stream);

}  // namespace qlora_native
