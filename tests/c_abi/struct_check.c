#include "struct_check.h"

#include <string.h>

#include "check.h"
#include "problem.h"

void test_struct(const struct_fixture* fixture, qn_status (*call)(void*), const void* valid,
                 size_t size) {
  enum { BIGGEST = 4096 };
  _Alignas(16) unsigned char memory[BIGGEST + 64];
  unsigned char before[sizeof(memory)];
  const uint64_t wrong[] = {0, 1, 7, 8, size - 8, size - 1, BIGGEST + 1, UINT64_MAX};
  fixture->set_up();
  CHECK_REFUSED(call(NULL), "is null");
  for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); ++i) {
    memset(memory, 0, sizeof(memory));
    memcpy(memory, valid, size);
    memcpy(memory, &wrong[i], sizeof(wrong[i]));
    memcpy(before, memory, sizeof(memory));
    CHECK_REFUSED(call(memory), "struct_size");
    CHECK_BYTES(memory, before, sizeof(memory));
  }
  for (size_t shift = 1; shift < 8; shift *= 2) {
    memset(memory, 0, sizeof(memory));
    memcpy(memory + shift, valid, size);
    memcpy(before, memory, sizeof(memory));
    CHECK_REFUSED(call(memory + shift), "not aligned");
    CHECK_BYTES(memory, before, sizeof(memory));
  }
  for (size_t more = 1; size + more <= BIGGEST; more = more < 16 ? more + 1 : BIGGEST - size) {
    const uint64_t larger = size + more;
    memset(memory, 0, sizeof(memory));
    memcpy(memory, valid, size);
    memcpy(memory, &larger, sizeof(larger));
    memory[larger - 1] = 1;
    memcpy(before, memory, sizeof(memory));
    CHECK_REFUSED(call(memory), "not zero beyond");
    CHECK_BYTES(memory, before, sizeof(memory));
    if (larger == BIGGEST) break;
  }
  CHECK(fixture->is_untouched());

  /* A later version's struct, of which the caller uses nothing that is new. */
  const uint64_t larger = size + 24;
  memset(memory, 0, sizeof(memory));
  memcpy(memory, valid, size);
  memcpy(memory, &larger, sizeof(larger));
  CHECK_OK(call(memory));
  CHECK_BYTES(memory, &larger, sizeof(larger));
  CHECK(is_filled(memory + size, 0, sizeof(memory) - size));
  fixture->tear_down();
  fixture->set_up();
  memcpy(memory, valid, size);
  CHECK_OK(call(memory));
  fixture->tear_down();
}

void test_output_struct(const struct_fixture* fixture, qn_status (*call)(void*), size_t size) {
  unsigned char valid[1024];
  const uint64_t struct_size = size;
  memset(valid, UNTOUCHED, sizeof(valid));
  memcpy(valid, &struct_size, sizeof(struct_size));
  test_struct(fixture, call, valid, size);
}
