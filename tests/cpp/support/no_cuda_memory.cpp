#include <stdexcept>

#include "support/device_memory.h"

namespace qlora_native::testing {
namespace {

[[noreturn]] void no_cuda() { throw std::logic_error("this build of the tests has no CUDA"); }

}  // namespace

bool cuda_available() { return false; }
void* cuda_allocate(int64_t) { no_cuda(); }
void cuda_free(void*) { no_cuda(); }
void cuda_copy(void*, const void*, int64_t) { no_cuda(); }
void* cuda_stream_create() { no_cuda(); }
void cuda_stream_destroy(void*) { no_cuda(); }
void cuda_stream_synchronize(void*) { no_cuda(); }

}  // namespace qlora_native::testing
