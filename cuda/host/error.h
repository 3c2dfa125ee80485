// Turns the error codes of the CUDA runtime into the library's exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace qlora_native::cuda {

/// Throws OutOfMemory for cudaErrorMemoryAllocation and CudaError for any other code. The message
/// holds the error's name, the driver's text and `what`. Also takes the error out of the runtime's
/// "last error", so that the next library to ask for it is not blamed for ours.
[[noreturn]] void throw_cuda_error(cudaError_t status, const std::string& what);

/// Throws as `throw_cuda_error` does when `status` is an error.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw_cuda_error(status, what);
}

}  // namespace qlora_native::cuda

/// Makes a call of the CUDA runtime and throws, with the text of the call, when it fails. A macro
/// because only the preprocessor has that text.
#define QN_CUDA_TRY(call) ::qlora_native::cuda::check((call), #call)
