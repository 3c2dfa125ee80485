/* Paged memory of the CPU: what a pool gives, takes, counts and refuses. */
#include "qlora_native/c_api_memory.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"

#define OFFSET_IS(type, member, bytes) \
  _Static_assert(offsetof(type, member) == (bytes), #type "." #member " has moved")
OFFSET_IS(qn_paged_pool_options, device_budget_bytes, 16);
OFFSET_IS(qn_paged_pool_options, device_type, 24);
OFFSET_IS(qn_paged_pool_options, backing, 32);
OFFSET_IS(qn_paged_pool_stats, used_bytes, 16);
OFFSET_IS(qn_paged_pool_stats, bytes_to_host, 80);
OFFSET_IS(qn_paged_pool_stats, backing, 88);
_Static_assert(sizeof(qn_paged_pool_options) == 40, "size");
_Static_assert(sizeof(qn_paged_pool_stats) == 96, "size");

enum { REGION_BYTES = 1 << 16 };

static qn_paged_pool_options options_of(void) {
  return (qn_paged_pool_options){.struct_size = sizeof(qn_paged_pool_options),
                                 .region_bytes = REGION_BYTES};
}

static qn_paged_pool_stats stats_of(const qn_paged_pool* pool) {
  qn_paged_pool_stats stats = {.struct_size = sizeof(stats)};
  CHECK_OK(qn_describe_paged_pool(pool, &stats));
  return stats;
}

static void test_use(void) {
  const qn_paged_pool_options options = options_of();
  qn_paged_pool* pool = NULL;
  CHECK_OK(qn_paged_pool_create(&options, &pool));
  CHECK(stats_of(pool).backing == QN_BACKING_HOST);
  CHECK(stats_of(pool).reserved_bytes == 0);
  enum { COUNT = 100, BYTES = 1000 };
  void* data[COUNT];
  void* addresses[COUNT];
  int64_t sizes[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    sizes[i] = BYTES;
    CHECK_OK(qn_paged_pool_allocate(pool, BYTES, &data[i], NULL));
    CHECK((uintptr_t)data[i] % QN_PAGED_ALIGNMENT == 0);
    memset(data[i], i, BYTES);
  }
  CHECK(stats_of(pool).used_bytes == COUNT * 1024);
  CHECK(stats_of(pool).allocations == COUNT);
  CHECK(stats_of(pool).reserved_bytes == 2 * REGION_BYTES);
  CHECK_OK(qn_paged_pool_plan(pool, data, sizes, COUNT));
  CHECK_OK(qn_paged_pool_prefetch(pool, data, sizes, COUNT, NULL));
  CHECK_OK(qn_paged_pool_acquire(pool, data, sizes, COUNT, QN_ACCESS_READ_WRITE, addresses, NULL));
  for (int i = 0; i < COUNT; ++i) {
    CHECK(is_filled(addresses[i], (unsigned char)i, BYTES));
    memset(addresses[i], i + 1, BYTES);
  }
  CHECK_REFUSED(qn_paged_pool_deallocate(pool, data[0], NULL), "acquired");
  CHECK_OK(qn_paged_pool_release(pool, data, sizes, COUNT, NULL));
  CHECK_OK(qn_paged_pool_evict(pool, data, sizes, COUNT, NULL));
  for (int i = 0; i < COUNT; ++i) {
    CHECK_OK(qn_paged_pool_host_view(pool, data[i], BYTES, NULL));
    CHECK(is_filled(data[i], (unsigned char)(i + 1), BYTES));
    if (i > 0) CHECK_OK(qn_paged_pool_deallocate(pool, data[i], NULL));
  }
  CHECK_OK(qn_paged_pool_trim(pool));
  CHECK(stats_of(pool).reserved_bytes == REGION_BYTES);
  CHECK(stats_of(pool).peak_used_bytes == COUNT * 1024);
  CHECK_OK(qn_paged_pool_destroy(pool)); /* and data[0] with it */
  CHECK_OK(qn_paged_pool_destroy(NULL));
}

static void test_nothing(qn_paged_pool* pool) {
  void* data = &data;
  CHECK_OK(qn_paged_pool_allocate(pool, 0, &data, NULL));
  CHECK(data == NULL);
  CHECK_OK(qn_paged_pool_deallocate(pool, NULL, NULL));
  CHECK_OK(qn_paged_pool_prefetch(pool, NULL, NULL, 0, NULL));
  CHECK_OK(qn_paged_pool_acquire(pool, NULL, NULL, 0, QN_ACCESS_READ, NULL, NULL));
  CHECK_OK(qn_paged_pool_host_view(pool, NULL, 0, NULL));
}

static void test_refusals(qn_paged_pool* pool) {
  void* data = NULL;
  void* untouched = &data;
  void* stranger = &data;
  int64_t bytes = 100;
  CHECK_OK(qn_paged_pool_allocate(pool, bytes, &data, NULL));
  CHECK_REFUSED(qn_paged_pool_allocate(pool, -1, &untouched, NULL), "-1 bytes");
  CHECK_FAILS(qn_paged_pool_allocate(pool, INT64_MAX, &untouched, NULL), QN_OUT_OF_MEMORY,
              "9223372036854775807 bytes");
  CHECK_FAILS(qn_paged_pool_allocate(pool, (int64_t)1 << 60, &untouched, NULL), QN_OUT_OF_MEMORY,
              "256 bytes in 1 allocations");
  CHECK_REFUSED(qn_paged_pool_acquire(pool, &stranger, &bytes, 1, QN_ACCESS_READ, &untouched, NULL),
                "does not lie in one live allocation");
  CHECK_REFUSED(qn_paged_pool_acquire(pool, &data, &bytes, 1, 3, &untouched, NULL), "no access 3");
  CHECK_REFUSED(qn_paged_pool_acquire(pool, &data, &bytes, 1, QN_ACCESS_READ, NULL, NULL),
                "addresses is null");
  CHECK_REFUSED(qn_paged_pool_acquire(pool, NULL, &bytes, 1, QN_ACCESS_READ, &untouched, NULL),
                "data is null");
  CHECK_REFUSED(qn_paged_pool_evict(pool, &data, NULL, 1, NULL), "size_bytes is null");
  CHECK_REFUSED(qn_paged_pool_plan(pool, &data, &bytes, -1), "count is -1");
  CHECK_REFUSED(qn_paged_pool_release(pool, &data, &bytes, 1, NULL), "not acquired");
  CHECK_REFUSED(qn_paged_pool_deallocate(pool, stranger, NULL), "not the start");
  CHECK(untouched == &data);
  CHECK_OK(qn_paged_pool_deallocate(pool, data, NULL));
  CHECK_REFUSED(qn_paged_pool_deallocate(pool, data, NULL), "not the start of a live allocation");

  CHECK_REFUSED(qn_paged_pool_trim(NULL), "pool is null");
  CHECK_REFUSED(qn_paged_pool_destroy((qn_paged_pool*)((char*)pool + 1)), "pool is not aligned");
  CHECK_REFUSED(qn_paged_pool_allocate(pool, 1, NULL, NULL), "data is null");
  qn_paged_pool_stats stats = {.struct_size = sizeof(stats) - 1, .allocations = -7};
  CHECK_REFUSED(qn_describe_paged_pool(pool, &stats), "struct_size");
  CHECK_REFUSED(qn_describe_paged_pool(pool, NULL), "stats is null");
  CHECK(stats.allocations == -7);
}

/* What every function that takes ranges refuses. */
static void refuse_ranges(qn_paged_pool* pool, void* const* data, const int64_t* sizes,
                          int64_t count, const char* words) {
  void* address = &address;
  CHECK_REFUSED(qn_paged_pool_prefetch(pool, data, sizes, count, NULL), words);
  CHECK_REFUSED(qn_paged_pool_evict(pool, data, sizes, count, NULL), words);
  CHECK_REFUSED(qn_paged_pool_plan(pool, data, sizes, count), words);
  CHECK_REFUSED(qn_paged_pool_acquire(pool, data, sizes, count, QN_ACCESS_READ, &address, NULL),
                words);
  CHECK_REFUSED(qn_paged_pool_release(pool, data, sizes, count, NULL), words);
  CHECK(address == &address);
}

static void test_ranges(qn_paged_pool* pool) {
  void* data = NULL;
  const int64_t good = 100;
  CHECK_OK(qn_paged_pool_allocate(pool, good, &data, NULL));
  memset(data, 5, (size_t)good);
  const qn_paged_pool_stats before = stats_of(pool);
  refuse_ranges(NULL, &data, &good, 1, "pool is null");
  refuse_ranges((qn_paged_pool*)((char*)pool + 1), &data, &good, 1, "pool is not aligned");
  refuse_ranges(pool, NULL, &good, 1, "data is null");
  refuse_ranges(pool, &data, NULL, 1, "size_bytes is null");
  refuse_ranges(pool, &data, (const int64_t*)((const char*)&good + 1), 1, "not aligned");
  refuse_ranges(pool, &data, &good, -1, "count is -1");
  static const int64_t wrong[] = {-1, 101, INT64_MIN, INT64_MAX};
  for (int i = 0; i < 4; ++i) {
    refuse_ranges(pool, &data, &wrong[i], 1, "does not lie in one live allocation");
    CHECK_REFUSED(qn_paged_pool_host_view(pool, data, wrong[i], NULL), "does not lie");
  }
  void* const address = (char*)data - 1;
  refuse_ranges(pool, &address, &good, 1, "does not lie in one live allocation");
  CHECK_REFUSED(qn_paged_pool_host_view(NULL, data, good, NULL), "pool is null");
  CHECK_REFUSED(qn_paged_pool_host_view(pool, NULL, good, NULL), "does not lie");
  CHECK(is_filled(data, 5, (size_t)good));
  const qn_paged_pool_stats after = stats_of(pool);
  CHECK_BYTES(&after, &before, sizeof(before));
  CHECK_OK(qn_paged_pool_deallocate(pool, data, NULL));
}

static void test_options(void) {
  qn_paged_pool* const unwritten = (qn_paged_pool*)&unwritten;
  qn_paged_pool* pool = unwritten;
  qn_paged_pool_options options = options_of();
  CHECK_REFUSED(qn_paged_pool_create(NULL, &pool), "options is null");
  CHECK_REFUSED(qn_paged_pool_create(&options, NULL), "pool is null");
  options.backing = 4;
  CHECK_REFUSED(qn_paged_pool_create(&options, &pool), "no backing 4");
  options = options_of();
  options.region_bytes = -1;
  CHECK_REFUSED(qn_paged_pool_create(&options, &pool), "region_bytes is -1");
  options = options_of();
  options.device_budget_bytes = 255;
  CHECK_REFUSED(qn_paged_pool_create(&options, &pool), "device_budget_bytes is 255");
  options = options_of();
  options.reserved = 1;
  CHECK_REFUSED(qn_paged_pool_create(&options, &pool), "reserved");
  options = options_of();
  options.device_index = 1;
  CHECK_REFUSED(qn_paged_pool_create(&options, &pool), "no device 1");
  options = options_of();
  options.device_type = QN_CUDA;
  options.device_index = 1000;
  CHECK(qn_paged_pool_create(&options, &pool) == QN_INVALID_ARGUMENT);
  options = options_of();
  options.struct_size = 8;
  CHECK_REFUSED(qn_paged_pool_create(&options, &pool), "struct_size");
  CHECK(pool == unwritten);
  CHECK(strcmp(qn_paged_backing_name(QN_BACKING_MANAGED), "managed") == 0);
  CHECK(strcmp(qn_paged_backing_name(99), "unknown") == 0);
}

static void test_automatic_backing(void) {
  qn_paged_backing backing = -7;
  char reason[256] = "", cut[3] = "xy";
  CHECK_REFUSED(qn_automatic_paged_backing(2, 0, &backing, reason, 8), "device_type 2");
  CHECK_REFUSED(qn_automatic_paged_backing(QN_CPU, 1, &backing, reason, 8), "no device 1");
  CHECK(qn_automatic_paged_backing(QN_CUDA, 1000, &backing, reason, 8) == QN_INVALID_ARGUMENT);
  CHECK_REFUSED(qn_automatic_paged_backing(QN_CPU, 0, NULL, reason, 8), "backing is null");
  CHECK_REFUSED(qn_automatic_paged_backing(QN_CPU, 0, &backing, NULL, 8), "reason is null");
  CHECK_REFUSED(qn_automatic_paged_backing(QN_CPU, 0, &backing, reason, 0), "reason has 0 bytes");
  CHECK(backing == -7 && reason[0] == '\0');
  CHECK_OK(qn_automatic_paged_backing(QN_CPU, 0, &backing, reason, sizeof(reason)));
  CHECK(backing == QN_BACKING_HOST && strlen(reason) > 0);
  CHECK_OK(qn_automatic_paged_backing(QN_CPU, 0, &backing, cut, sizeof(cut)));
  CHECK(memcmp(cut, reason, 2) == 0 && cut[2] == '\0');
}

void test_memory(void) {
  test_automatic_backing();
  test_use();
  test_options();
  const qn_paged_pool_options options = options_of();
  qn_paged_pool* pool = NULL;
  CHECK_OK(qn_paged_pool_create(&options, &pool));
  test_nothing(pool);
  test_refusals(pool);
  test_ranges(pool);
  CHECK_OK(qn_paged_pool_destroy(pool));
}
