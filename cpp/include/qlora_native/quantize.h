// Quantization of a float array to 4 bits.
#pragma once

#include "qlora_native/export.h"
#include "qlora_native/quantized.h"
#include "qlora_native/stream.h"
#include "qlora_native/views.h"

namespace qlora_native {

struct QuantizeArgs {
  VectorView input;             ///< rows * cols elements in row-major order: fp32, fp16 or bf16
  MutableQuantizedView output;  ///< where everything is written
  /// When not null: one fp32 on the output's device, used as the offset of the double quantization
  /// instead of the mean of the absmax values.
  const float* pinned_offset = nullptr;
};

/// Scratch bytes `quantize_4bit` needs for these arguments. Throws as it does.
QN_API int64_t quantize_4bit_workspace_bytes(const QuantizeArgs& args);

/// Writes codes and scales of `args.input` to `args.output`. For every block:
///   absmax  = max |x|;  code = encode(x * (1 / absmax)), fp32, IEEE rounding.
///   A block that is all zeros, or so small that 1 / absmax overflows, gets absmax 0 and zero
///   codes.
///   A block with a NaN or an infinity gets absmax NaN (0x7fc00000) and zero codes: it decodes
///   to NaN.
/// With double quantization (output.absmax.codes not null), over the absmax values a[b]:
///   offset  = mean of the finite a[b], summed in fp64 in the fixed order that
///             cpp/src/cpu/double_quantize.cpp describes, rounded once;
///   absmax2 = max |a[b] - offset| over each 256 blocks;
///   codes   = nearest entry of the signed dynamic map to (a[b] - offset) * (1 / absmax2).
///   A group that holds a NaN block gets absmax2 NaN, so all its blocks decode to NaN.
/// The bytes are the same on every backend, with every thread count.
///
/// `workspace`: at least `quantize_4bit_workspace_bytes(args)`. `stream`: where CUDA work is
/// queued; the call does not wait for it and can be captured in a CUDA graph.
/// Throws InvalidArgument (before any output is touched), Unsupported, CudaError.
QN_API void quantize_4bit(const QuantizeArgs& args, Workspace workspace, Stream stream);

}  // namespace qlora_native
