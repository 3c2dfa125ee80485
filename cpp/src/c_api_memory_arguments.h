// What C calls a pool, and arrays of ranges, as the C++ interface has them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "c_api_struct.h"
#include "qlora_native/c_api_memory.h"
#include "qlora_native/memory.h"

struct qn_paged_pool {
  qlora_native::PagedPool pool;
};

namespace qlora_native::c_api {

/// The pool behind a handle, which may be const.
template <class Pool>
auto& pool_of(const char* function, Pool* pool) {
  check_pointer(function, "pool", pool, alignof(qn_paged_pool));
  return pool->pool;
}

inline std::vector<PagedRange> ranges_of(const char* function, void* const* data,
                                         const int64_t* size_bytes, int64_t count) {
  if (count < 0) fail(function, "count is " + std::to_string(count));
  if (count == 0) return {};
  check_pointer(function, "data", data, alignof(void*));
  check_pointer(function, "size_bytes", size_bytes, alignof(int64_t));
  std::vector<PagedRange> ranges(static_cast<size_t>(count));
  for (size_t i = 0; i < ranges.size(); ++i) ranges[i] = {data[i], size_bytes[i]};
  return ranges;
}

}  // namespace qlora_native::c_api
