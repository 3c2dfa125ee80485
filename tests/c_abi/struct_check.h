/* What has to hold of every struct that a function takes: which struct_size is accepted, and that
 * nothing is touched otherwise. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "qlora_native/c_api.h"

typedef struct struct_fixture {
  void (*set_up)(void); /* makes what the calls use */
  void (*tear_down)(void);
  bool (*is_untouched)(void); /* no call has written to an output since set_up */
} struct_fixture;

/* `call` hands the struct to one function; `valid`, of `size` bytes, is one that set_up renews. */
void test_struct(const struct_fixture* fixture, qn_status (*call)(void*), const void* valid,
                 size_t size);

/* Of structs that the library fills in: they need their size alone. */
void test_output_struct(const struct_fixture* fixture, qn_status (*call)(void*), size_t size);
