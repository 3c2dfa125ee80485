// The library's stream handle as the CUDA runtime's type.
#pragma once

#include <cuda_runtime_api.h>

#include "qlora_native/stream.h"

namespace qlora_native::cuda {

inline cudaStream_t to_cuda(Stream stream) { return static_cast<cudaStream_t>(stream.handle()); }

}  // namespace qlora_native::cuda
