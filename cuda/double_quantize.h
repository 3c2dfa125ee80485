// The second level of double quantization on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "device/group_sum.cuh"
#include "qlora_native/quantized.h"

namespace qlora_native::cuda {

/// Scratch bytes for the sums of the groups, for any alignment to 8 bytes.
int64_t group_sums_bytes(int64_t blocks);
GroupSums group_sums(void* scratch, int64_t blocks);

/// Queues stage 1 of the sum, for a first level that has not left it behind.
void sum_groups(const float* absmax, int64_t blocks, const GroupSums& sums, cudaStream_t stream);

/// Queues the computation of `out.offset`, `out.absmax2` and `out.codes` from absmax[blocks]
/// (blocks > 0) and the sums of its groups. `pinned_offset`, when not null, is one fp32 on the
/// device that takes the place of the mean; the sums are not read then.
void encode_absmax(const float* absmax, int64_t blocks, const float* pinned_offset,
                   const GroupSums& sums, const MutableAbsmax& out, cudaStream_t stream);

}  // namespace qlora_native::cuda
