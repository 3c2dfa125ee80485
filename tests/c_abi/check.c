#include "check.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

static atomic_int failed = 0;

static void report(const char* file, int line, const char* what) {
  fprintf(stderr, "%s:%d: %s\n", file, line, what);
  ++failed;
}

void check_that(bool holds, const char* condition, const char* file, int line) {
  if (!holds) report(file, line, condition);
}

void check_status(qn_status status, qn_status expected, const char* words, const char* call,
                  const char* file, int line) {
  const char* message = qn_last_error_message();
  if (status != expected) {
    report(file, line, call);
    fprintf(stderr, "  is %s (%s), expected %s\n", qn_status_string(status), message,
            qn_status_string(expected));
  } else if (status != QN_OK && strstr(message, words) == NULL) {
    report(file, line, call);
    fprintf(stderr, "  '%s' is missing from: %s\n", words, message);
  }
}

void check_equal_bytes(const void* actual, const void* expected, size_t bytes, const char* what,
                       const char* file, int line) {
  const unsigned char* a = actual;
  const unsigned char* b = expected;
  for (size_t i = 0; i < bytes; ++i) {
    if (a[i] != b[i]) {
      report(file, line, what);
      fprintf(stderr, "  byte %zu of %zu is %02x, expected %02x\n", i, bytes, a[i], b[i]);
      return;
    }
  }
}

int failures(void) { return failed; }

bool is_filled(const void* data, unsigned char value, size_t bytes) {
  const unsigned char* byte = data;
  for (size_t i = 0; i < bytes; ++i) {
    if (byte[i] != value) return false;
  }
  return true;
}
