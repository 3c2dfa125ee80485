// The second level of double quantization on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "qlora_native/quantized.h"

namespace qlora_native::cuda {

/// Scratch bytes that `double_quantize` needs, for any alignment to 8 bytes.
int64_t double_quantize_scratch_bytes(int64_t blocks);

/// Queues the computation of `out.offset`, `out.absmax2` and `out.codes` from absmax[blocks]
/// (blocks > 0). `pinned_offset`, when not null, is one fp32 on the device that takes the place of
/// the mean.
void double_quantize(const float* absmax, int64_t blocks, const float* pinned_offset,
                     const MutableAbsmax& out, void* scratch, cudaStream_t stream);

}  // namespace qlora_native::cuda
