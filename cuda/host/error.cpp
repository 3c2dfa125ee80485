#include "host/error.h"

#include "qlora_native/error.h"

namespace qlora_native::cuda {

void throw_cuda_error(cudaError_t status, const std::string& what) {
  static_cast<void>(cudaGetLastError());
  const std::string message =
      std::string(cudaGetErrorName(status)) + " (" + cudaGetErrorString(status) + ") from " + what;
  if (status == cudaErrorMemoryAllocation) throw OutOfMemory(message);
  throw CudaError(static_cast<int>(status), message);
}

}  // namespace qlora_native::cuda
