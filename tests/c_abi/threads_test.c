/* Several threads call at once; each has its own message. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "problem.h"

enum { THREADS = 6, ROUNDS = 40 };

typedef struct task {
  int number;
  const problem* expected;
} task;

static void* work(void* argument) {
  const task* const me = argument;
  CHECK(strcmp(qn_last_error_message(), "") == 0);
  problem p = make_problem(64, 256, 64, QN_NF4, true);
  const float one = 1.0f;
  for (int round = 0; round < ROUNDS; ++round) {
    /* A block size that nobody else asks for. */
    qn_weight_sizes sizes = {.struct_size = sizeof(sizes)};
    char words[32];
    snprintf(words, sizeof(words), "block_size %d ", 5000 + me->number);
    CHECK_REFUSED(qn_describe_weight(1, 1, 5000 + me->number, &sizes), words);
    quantize(&p);
    dequantize(&p);
    CHECK_BYTES(p.decoded, me->expected->decoded, (size_t)p.numel * 4);
    CHECK(strstr(qn_last_error_message(), words) != NULL);

    float y[64];
    const qn_matmul_args args = {.struct_size = sizeof(args),
                                 .x = p.input,
                                 .m = 1,
                                 .x_row_stride = 256,
                                 .weight = &p.weight,
                                 .y = y,
                                 .y_row_stride = 64};
    qn_matmul_plan plan = {.struct_size = sizeof(plan)};
    CHECK_OK(qn_matmul_4bit_plan(&args, &plan));
    qn_quantize_args bad = quantize_args(&p);
    bad.pinned_offset = &one;
    bad.dtype = 100 + me->number;
    snprintf(words, sizeof(words), "dtype %d", 100 + me->number);
    CHECK_REFUSED(qn_quantize_4bit(&bad, NULL, 0, NULL), words);
  }
  free_problem(&p);
  return NULL;
}

void test_threads(void) {
  problem expected = make_problem(64, 256, 64, QN_NF4, true);
  quantize(&expected);
  dequantize(&expected);
  CHECK_REFUSED(qn_cpu_threads(NULL), "threads is null");
  pthread_t threads[THREADS];
  task tasks[THREADS];
  for (int t = 0; t < THREADS; ++t) {
    tasks[t] = (task){t, &expected};
    CHECK(pthread_create(&threads[t], NULL, work, &tasks[t]) == 0);
  }
  for (int t = 0; t < THREADS; ++t) CHECK(pthread_join(threads[t], NULL) == 0);
  CHECK(strstr(qn_last_error_message(), "threads is null") != NULL);
  free_problem(&expected);
}
