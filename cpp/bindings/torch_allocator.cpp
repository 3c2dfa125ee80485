// Managed memory for torch's caching allocator: the two functions that a
// torch.cuda.memory.CUDAPluggableAllocator looks up in this library by name. torch divides and
// reuses what it gets, so each request is for a region.
#include <cstdint>
#include <exception>
#include <map>
#include <mutex>

#include "qlora_native/export.h"
#include "qlora_native/memory.h"

namespace qn = qlora_native;

namespace {

/// The pool that torch's memory on a device comes from. Never destroyed: torch may give memory back
/// while the process ends.
qn::PagedPool& pool_of(int device) {
  static std::mutex mutex;
  static auto* const pools = new std::map<int, qn::PagedPool>;
  const std::lock_guard locked(mutex);
  auto found = pools->find(device);
  if (found == pools->end()) {
    // torch asks for 2 MiB at least: regions that small are never shared by two requests.
    const qn::PagedPool made({.device = qn::Device::cuda(device),
                              .backing = qn::Backing::kManaged,
                              .region_bytes = int64_t{2} << 20});
    found = pools->emplace(device, made).first;
  }
  return found->second;
}

}  // namespace

/// torch's signatures. No exception passes: null is torch's out of memory.
extern "C" QN_API void* qn_torch_managed_allocate(int64_t size_bytes, int device, void* stream) {
  try {
    return pool_of(device).allocate(size_bytes, qn::Stream::from_handle(stream));
  } catch (const std::exception&) {
    return nullptr;
  }
}

extern "C" QN_API void qn_torch_managed_free(void* data, int64_t, int device, void* stream) {
  try {
    pool_of(device).deallocate(data, qn::Stream::from_handle(stream));
  } catch (const std::exception&) {
    // The runtime is gone, at the end of the process, and the memory with it.
    return;
  }
}
