// Memory of the device under test. The CUDA functions are in cuda_memory.cpp, or, in a build
// without CUDA, in no_cuda_memory.cpp, where cuda_available() is false and the others throw.
#pragma once

#include <cstdint>

namespace qlora_native::testing {

bool cuda_available();
void* cuda_allocate(int64_t bytes);
void cuda_free(void* data);
/// Either side may be on the host or on the device; returns when the copy is done.
void cuda_copy(void* to, const void* from, int64_t bytes);
void* cuda_stream_create();
void cuda_stream_destroy(void* stream);
void cuda_stream_synchronize(void* stream);

}  // namespace qlora_native::testing
