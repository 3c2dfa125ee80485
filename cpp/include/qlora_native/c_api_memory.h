/* The C ABI of paged memory; what c_api.h says of statuses, structs, streams and threads holds here.
 * memory.h explains what a pool is, how it moves bytes, and in which order.
 *
 * Unlike the rest of the library, a pool owns memory: its allocations, which end with it. Ranges are
 * given as two arrays: data[i] and size_bytes[i] for i < count, each within one live allocation; both
 * may be null when count is 0. Besides what is listed, a function that takes a pool returns
 * QN_INVALID_ARGUMENT for ranges that are not so, and QN_INTERNAL_ERROR in a child that was forked
 * after the pool was made. `stream` is of the pool's device. */
#pragma once

#include <stdint.h>

#include "qlora_native/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t qn_paged_backing;
enum {
  QN_BACKING_AUTO = 0,    /* managed where the device can page while it computes, else pinned */
  QN_BACKING_MANAGED = 1, /* unified memory */
  QN_BACKING_PINNED = 2,  /* pinned host memory with a staging cache on the device */
  QN_BACKING_HOST = 3     /* what a pool of the CPU has, whichever was asked for */
};

typedef int32_t qn_paged_access;
enum {
  QN_ACCESS_READ = 0,
  QN_ACCESS_WRITE = 1, /* writes every byte, and reads none that it has not written */
  QN_ACCESS_READ_WRITE = 2
};

enum { QN_PAGED_ALIGNMENT = 256 }; /* bytes, of allocations and staged copies */

typedef struct qn_paged_pool qn_paged_pool;

typedef struct qn_paged_pool_options {
  uint64_t struct_size;
  int64_t region_bytes;        /* 0: 64 MiB */
  int64_t device_budget_bytes; /* of the staging cache, for the pinned backing; 0: 256 MiB */
  qn_device_type device_type;
  int32_t device_index; /* 0 on the CPU */
  qn_paged_backing backing;
  int32_t reserved;
} qn_paged_pool_options;

typedef struct qn_paged_pool_stats {
  uint64_t struct_size;
  int64_t reserved_bytes;        /* of all regions */
  int64_t used_bytes;            /* of live allocations, each rounded up to QN_PAGED_ALIGNMENT */
  int64_t peak_used_bytes;       /* the most that used_bytes has been */
  int64_t allocations;           /* live ones */
  int64_t device_resident_bytes; /* on the device, as far as the pool has moved them */
  int64_t device_reserved_bytes; /* of the staging cache */
  int64_t prefetches;            /* ranges brought to the device ahead of their acquire */
  int64_t evictions;             /* ranges moved off the device */
  int64_t bytes_to_device;       /* moved so far */
  int64_t bytes_to_host;
  qn_paged_backing backing; /* never QN_BACKING_AUTO */
  int32_t reserved;
} qn_paged_pool_stats;

/* What a backing is called ("auto", "managed", "pinned", "host"), or "unknown". Never null; static;
 * cannot fail. */
QN_API const char* qn_paged_backing_name(qn_paged_backing backing);

/* Writes what QN_BACKING_AUTO stands for on a device to `backing`, and why, for people, to `reason`,
 * cut to `reason_bytes` bytes with the final zero. Errors: QN_INVALID_ARGUMENT when there is no such
 * device or reason_bytes < 1. */
QN_API qn_status qn_automatic_paged_backing(qn_device_type device_type, int32_t device_index,
                                            qn_paged_backing* backing, char* reason,
                                            int64_t reason_bytes);

/* Writes a pool, which takes no memory yet, to `pool`. Errors: QN_INVALID_ARGUMENT when a size is
 * less than QN_PAGED_ALIGNMENT, or there is no such device; QN_UNSUPPORTED when the device does not
 * have the backing; QN_CUDA_ERROR. */
QN_API qn_status qn_paged_pool_create(const qn_paged_pool_options* options, qn_paged_pool** pool);

/* Ends a pool and its allocations; NULL is fine. No other call uses the pool at the same time, and
 * no work uses its memory any more. Waits for the device where the CUDA runtime does when it frees
 * memory. */
QN_API qn_status qn_paged_pool_destroy(qn_paged_pool* pool);

/* Fills in `stats`. */
QN_API qn_status qn_describe_paged_pool(const qn_paged_pool* pool, qn_paged_pool_stats* stats);

/* Writes the address of `size_bytes` uninitialized bytes to `data`: null for 0. `stream` is where
 * they are used first. Errors: QN_INVALID_ARGUMENT when size_bytes < 0; QN_OUT_OF_MEMORY; and
 * QN_UNSUPPORTED while `stream` is being captured; QN_CUDA_ERROR. */
QN_API qn_status qn_paged_pool_allocate(qn_paged_pool* pool, int64_t size_bytes, void** data,
                                        void* stream);

/* Takes an allocation back, when what is queued on `stream` now is done. `data` may be null. Errors:
 * QN_INVALID_ARGUMENT when it is no live allocation, or acquired; QN_CUDA_ERROR. */
QN_API qn_status qn_paged_pool_deallocate(qn_paged_pool* pool, void* data, void* stream);

/* Begin to move ranges to the device, beside what is queued on `stream`, and to the host, after it.
 * Errors: QN_UNSUPPORTED while `stream` is being captured; QN_OUT_OF_MEMORY; QN_CUDA_ERROR. */
QN_API qn_status qn_paged_pool_prefetch(qn_paged_pool* pool, void* const* data,
                                        const int64_t* size_bytes, int64_t count, void* stream);
QN_API qn_status qn_paged_pool_evict(qn_paged_pool* pool, void* const* data,
                                     const int64_t* size_bytes, int64_t count, void* stream);

/* The order in which ranges are going to be acquired, once. Errors: QN_OUT_OF_MEMORY, QN_CUDA_ERROR. */
QN_API qn_status qn_paged_pool_plan(qn_paged_pool* pool, void* const* data,
                                    const int64_t* size_bytes, int64_t count);

/* Writes to addresses[i] where work queued on `stream` after the call finds the bytes of range i, and
 * leaves them, until they are released; all of them or none. Errors: QN_OUT_OF_MEMORY when the
 * staging cache has no room beside what is acquired; QN_UNSUPPORTED (pinned) while `stream` is being
 * captured; QN_CUDA_ERROR. */
QN_API qn_status qn_paged_pool_acquire(qn_paged_pool* pool, void* const* data,
                                       const int64_t* size_bytes, int64_t count,
                                       qn_paged_access access, void** addresses, void* stream);

/* Ends one acquire of each range, after what is queued on `stream` now. Errors:
 * QN_INVALID_ARGUMENT when a range is not acquired; QN_CUDA_ERROR. */
QN_API qn_status qn_paged_pool_release(qn_paged_pool* pool, void* const* data,
                                       const int64_t* size_bytes, int64_t count, void* stream);

/* Makes a range's own address show the newest bytes to the host, and waits for that and for what is
 * queued on `stream`. The host may read and write there until the range is next acquired, prefetched
 * or planned. Errors: QN_INVALID_ARGUMENT while it is acquired; QN_UNSUPPORTED while `stream` is
 * being captured; QN_CUDA_ERROR. */
QN_API qn_status qn_paged_pool_host_view(qn_paged_pool* pool, void* data, int64_t size_bytes,
                                         void* stream);

/* Gives back regions without allocations, one of which is kept otherwise. May wait, as destroy. */
QN_API qn_status qn_paged_pool_trim(qn_paged_pool* pool);

#ifdef __cplusplus
}
#endif
