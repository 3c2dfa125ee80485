/* Checks that go on after a failure, and count it. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "qlora_native/c_api.h"

void check_that(bool holds, const char* condition, const char* file, int line);
void check_status(qn_status status, qn_status expected, const char* words, const char* call,
                  const char* file, int line);
void check_equal_bytes(const void* actual, const void* expected, size_t bytes, const char* what,
                       const char* file, int line);
int failures(void);

/* Whether all `bytes` bytes are `value`. */
bool is_filled(const void* data, unsigned char value, size_t bytes);

#define CHECK(condition) check_that((condition), #condition, __FILE__, __LINE__)
#define CHECK_OK(call) check_status((call), QN_OK, "", #call, __FILE__, __LINE__)
/* The call returns `status`, and the message holds `words`. */
#define CHECK_FAILS(call, status, words) \
  check_status((call), (status), (words), #call, __FILE__, __LINE__)
#define CHECK_REFUSED(call, words) CHECK_FAILS(call, QN_INVALID_ARGUMENT, words)
#define CHECK_BYTES(actual, expected, bytes) \
  check_equal_bytes((actual), (expected), (bytes), #actual, __FILE__, __LINE__)

void test_operations(void);
void test_grouped(void);
void test_optimizer(void);
void test_paged_optimizer(void);
void test_lora(void);
void test_queries(void);
void test_kernels(void);
void test_memory(void);
void test_bad_arguments(void);
void test_bad_structs(void);
void test_bad_optimizer_structs(void);
void test_threads(void);
