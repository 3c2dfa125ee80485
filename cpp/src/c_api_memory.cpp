// Paged memory in the C ABI.
#include "qlora_native/c_api_memory.h"

#include <algorithm>
#include <memory>

#include "c_api_arguments.h"
#include "c_api_guard.h"
#include "c_api_memory_arguments.h"
#include "c_api_struct.h"
#include "qlora_native/memory.h"

namespace qn = qlora_native;
using qn::Stream;
using qn::c_api::accepted_size;
using qn::c_api::check_enum;
using qn::c_api::check_pointer;
using qn::c_api::guarded;
using qn::c_api::pool_of;
using qn::c_api::ranges_of;
using qn::c_api::read_struct;

static_assert(static_cast<int32_t>(qn::Backing::kHost) == QN_BACKING_HOST);
static_assert(static_cast<int32_t>(qn::Access::kReadWrite) == QN_ACCESS_READ_WRITE);
static_assert(qn::kPagedAlignment == QN_PAGED_ALIGNMENT);

const char* qn_paged_backing_name(qn_paged_backing backing) {
  return qn::name(static_cast<qn::Backing>(backing));
}

qn_status qn_automatic_paged_backing(qn_device_type device_type, int32_t device_index,
                                     qn_paged_backing* backing, char* reason,
                                     int64_t reason_bytes) {
  return guarded(__func__, [&](const char* function) {
    check_pointer(function, "backing", backing, alignof(qn_paged_backing));
    qn::c_api::check_buffer(function, "reason", reason, reason_bytes);
    const qn::BackingChoice choice =
        qn::automatic_backing(qn::c_api::to_device(function, device_type, device_index));
    *backing = static_cast<qn_paged_backing>(choice.backing);
    qn::c_api::copy_cut(choice.reason, reason, reason_bytes);
  });
}

qn_status qn_paged_pool_create(const qn_paged_pool_options* options, qn_paged_pool** pool) {
  return guarded(__func__, [&](const char* function) {
    check_pointer(function, "pool", pool, alignof(qn_paged_pool*));
    const qn_paged_pool_options given = read_struct(function, "options", options);
    check_enum(function, "backing", given.backing, QN_BACKING_HOST + 1);
    qn::c_api::check_reserved(function, "options", given.reserved);
    qn::PagedPoolOptions wanted;
    wanted.device = qn::c_api::to_device(function, given.device_type, given.device_index);
    wanted.backing = static_cast<qn::Backing>(given.backing);
    if (given.region_bytes != 0) wanted.region_bytes = given.region_bytes;
    if (given.device_budget_bytes != 0) wanted.device_budget_bytes = given.device_budget_bytes;
    *pool = std::make_unique<qn_paged_pool>(qn_paged_pool{qn::PagedPool(wanted)}).release();
  });
}

qn_status qn_paged_pool_destroy(qn_paged_pool* pool) {
  return guarded(__func__, [&](const char* function) {
    qn::c_api::check_alignment(function, "pool", pool, alignof(qn_paged_pool));
    delete pool;
  });
}

qn_status qn_describe_paged_pool(const qn_paged_pool* pool, qn_paged_pool_stats* stats) {
  return guarded(__func__, [&](const char* function) {
    const qn::PagedPool& found = pool_of(function, pool);
    const uint64_t size = accepted_size(function, "stats", stats);
    const qn::PagedPoolStats counted = found.stats();
    qn_paged_pool_stats filled{};
    filled.reserved_bytes = counted.reserved_bytes;
    filled.used_bytes = counted.used_bytes;
    filled.peak_used_bytes = counted.peak_used_bytes;
    filled.allocations = counted.allocations;
    filled.device_resident_bytes = counted.device_resident_bytes;
    filled.device_reserved_bytes = counted.device_reserved_bytes;
    filled.prefetches = counted.prefetches;
    filled.evictions = counted.evictions;
    filled.bytes_to_device = counted.bytes_to_device;
    filled.bytes_to_host = counted.bytes_to_host;
    filled.backing = static_cast<qn_paged_backing>(found.backing());
    qn::c_api::write_struct(stats, size, filled);
  });
}

qn_status qn_paged_pool_allocate(qn_paged_pool* pool, int64_t size_bytes, void** data,
                                 void* stream) {
  return guarded(__func__, [&](const char* function) {
    check_pointer(function, "data", data, alignof(void*));
    *data = pool_of(function, pool).allocate(size_bytes, Stream::from_handle(stream));
  });
}

qn_status qn_paged_pool_deallocate(qn_paged_pool* pool, void* data, void* stream) {
  return guarded(__func__, [&](const char* function) {
    pool_of(function, pool).deallocate(data, Stream::from_handle(stream));
  });
}

qn_status qn_paged_pool_prefetch(qn_paged_pool* pool, void* const* data, const int64_t* size_bytes,
                                 int64_t count, void* stream) {
  return guarded(__func__, [&](const char* function) {
    pool_of(function, pool)
        .prefetch(ranges_of(function, data, size_bytes, count), Stream::from_handle(stream));
  });
}

qn_status qn_paged_pool_evict(qn_paged_pool* pool, void* const* data, const int64_t* size_bytes,
                              int64_t count, void* stream) {
  return guarded(__func__, [&](const char* function) {
    pool_of(function, pool)
        .evict(ranges_of(function, data, size_bytes, count), Stream::from_handle(stream));
  });
}

qn_status qn_paged_pool_plan(qn_paged_pool* pool, void* const* data, const int64_t* size_bytes,
                             int64_t count) {
  return guarded(__func__, [&](const char* function) {
    pool_of(function, pool).plan(ranges_of(function, data, size_bytes, count));
  });
}

qn_status qn_paged_pool_acquire(qn_paged_pool* pool, void* const* data, const int64_t* size_bytes,
                                int64_t count, qn_paged_access access, void** addresses,
                                void* stream) {
  return guarded(__func__, [&](const char* function) {
    qn::PagedPool& found = pool_of(function, pool);
    check_enum(function, "access", access, QN_ACCESS_READ_WRITE + 1);
    const std::vector<qn::PagedRange> ranges = ranges_of(function, data, size_bytes, count);
    if (count > 0) check_pointer(function, "addresses", addresses, alignof(void*));
    // The caller's array is touched only when all of them are there.
    std::vector<void*> result(ranges.size());
    found.acquire(ranges, static_cast<qn::Access>(access), result, Stream::from_handle(stream));
    std::copy(result.begin(), result.end(), addresses);
  });
}

qn_status qn_paged_pool_release(qn_paged_pool* pool, void* const* data, const int64_t* size_bytes,
                                int64_t count, void* stream) {
  return guarded(__func__, [&](const char* function) {
    pool_of(function, pool)
        .release(ranges_of(function, data, size_bytes, count), Stream::from_handle(stream));
  });
}

qn_status qn_paged_pool_host_view(qn_paged_pool* pool, void* data, int64_t size_bytes,
                                  void* stream) {
  return guarded(__func__, [&](const char* function) {
    pool_of(function, pool).host_view({data, size_bytes}, Stream::from_handle(stream));
  });
}

qn_status qn_paged_pool_trim(qn_paged_pool* pool) {
  return guarded(__func__, [&](const char* function) { pool_of(function, pool).trim(); });
}
