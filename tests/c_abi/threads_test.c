/* Several threads call at once: each has its own message and results, and what they share (a pool,
 * the process's settings) stays in order. The thread sanitizer runs this too (make tsan). */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qlora_native/c_api_memory.h"

#include "check.h"
#include "optimizer_model.h"
#include "problem.h"

/* The weight is large enough to be cut into parts for several threads. */
enum { THREADS = 6, ROUNDS = 20, ROWS = 256, COLS = 1024 };

typedef struct task {
  int number;
  const problem* expected;
  const model* expected_model; /* after ROUNDS steps */
  qn_paged_pool* pool;
} task;

static void* work(void* argument) {
  const task* const me = argument;
  CHECK(strcmp(qn_last_error_message(), "") == 0);
  problem p = make_problem(ROWS, COLS, 64, QN_NF4, true);
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

    float y[ROWS];
    const qn_matmul_args args = {.struct_size = sizeof(args),
                                 .x = p.input,
                                 .m = 1,
                                 .x_row_stride = COLS,
                                 .weight = &p.weight,
                                 .y = y,
                                 .y_row_stride = ROWS};
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

/* Steps of a model of one's own. */
static void* train(void* argument) {
  const task* const me = argument;
  model* const m = make_model();
  int64_t bytes = 0;
  CHECK_OK(qn_optimizer_step_workspace_bytes(&m->args, &bytes));
  void* workspace = workspace_memory(bytes);
  for (int round = 0; round < ROUNDS; ++round) {
    CHECK_OK(qn_optimizer_step(&m->args, workspace, bytes, NULL));
  }
  free(workspace);
  if (me->expected_model != NULL) {
    CHECK_BYTES(m->param, me->expected_model->param, sizeof(m->param));
    CHECK_BYTES(m->moment_codes, me->expected_model->moment_codes, sizeof(m->moment_codes));
    free(m);
    return NULL;
  }
  return m;
}

/* Allocations of one's own in a pool that all share. */
static void* page(void* argument) {
  const task* const me = argument;
  for (int round = 0; round < ROUNDS; ++round) {
    void* data = NULL;
    void* address = NULL;
    const int64_t size = 1000 + 100 * me->number + round;
    const unsigned char value = (unsigned char)(me->number * ROUNDS + round);
    CHECK_OK(qn_paged_pool_allocate(me->pool, size, &data, NULL));
    memset(data, value, (size_t)size);
    CHECK_OK(qn_paged_pool_plan(me->pool, &data, &size, 1));
    CHECK_OK(qn_paged_pool_acquire(me->pool, &data, &size, 1, QN_ACCESS_READ, &address, NULL));
    CHECK(is_filled(address, value, (size_t)size));
    CHECK_OK(qn_paged_pool_release(me->pool, &data, &size, 1, NULL));
    CHECK_OK(qn_paged_pool_evict(me->pool, &data, &size, 1, NULL));
    CHECK_OK(qn_paged_pool_deallocate(me->pool, data, NULL));
    if (round % 8 == 0) CHECK_OK(qn_paged_pool_trim(me->pool));
    qn_paged_pool_stats stats = {.struct_size = sizeof(stats)};
    CHECK_OK(qn_describe_paged_pool(me->pool, &stats));
    CHECK(stats.allocations >= 0 && stats.allocations < THREADS);
  }
  return NULL;
}

static void run_here(int32_t threads, void (*body)(void* context), void* context) {
  (void)threads;
  body(context);
}

/* Changes what the process has set, none of which changes a result, while others compute. */
static void* change_settings(void* argument) {
  (void)argument;
  for (int round = 0; round < 4 * ROUNDS; ++round) {
    const qn_op op = round % 2 == 0 ? QN_QUANTIZE_4BIT : QN_DEQUANTIZE_4BIT;
    char name[QN_KERNEL_NAME_BYTES];
    int32_t threads = 0;
    CHECK_OK(qn_force_kernel(op, QN_CPU, "scalar"));
    CHECK_OK(qn_forced_kernel(op, QN_CPU, name, sizeof(name)));
    CHECK_OK(qn_last_kernel(op, name, sizeof(name)));
    CHECK_OK(qn_set_cpu_threads(1 + round % 4));
    CHECK_OK(qn_cpu_threads(&threads));
    CHECK(threads == 1 + round % 4);
    CHECK_OK(qn_set_cpu_executor(round % 3 == 0 ? run_here : NULL));
    CHECK_OK(qn_unforce_kernel(op, QN_CPU));
  }
  CHECK_OK(qn_set_cpu_executor(NULL));
  return NULL;
}

void test_threads(void) {
  problem expected = make_problem(ROWS, COLS, 64, QN_NF4, true);
  quantize(&expected);
  dequantize(&expected);
  int32_t threads_before = 0;
  CHECK_OK(qn_cpu_threads(&threads_before));
  const task alone = {.number = 0};
  model* const expected_model = train((void*)(uintptr_t)&alone);
  const qn_paged_pool_options options = {.struct_size = sizeof(options), .region_bytes = 1 << 16};
  qn_paged_pool* pool = NULL;
  CHECK_OK(qn_paged_pool_create(&options, &pool));
  CHECK_REFUSED(qn_cpu_threads(NULL), "threads is null");

  void* (*const kinds[])(void*) = {work, train, page};
  enum { KINDS = 3 };
  pthread_t threads[KINDS * THREADS + 1];
  task tasks[KINDS * THREADS];
  for (int t = 0; t < KINDS * THREADS; ++t) {
    tasks[t] = (task){t / KINDS, &expected, expected_model, pool};
    CHECK(pthread_create(&threads[t], NULL, kinds[t % KINDS], &tasks[t]) == 0);
  }
  CHECK(pthread_create(&threads[KINDS * THREADS], NULL, change_settings, NULL) == 0);
  for (int t = 0; t <= KINDS * THREADS; ++t) CHECK(pthread_join(threads[t], NULL) == 0);

  CHECK(strstr(qn_last_error_message(), "threads is null") != NULL);
  CHECK_OK(qn_set_cpu_threads(threads_before));
  CHECK_OK(qn_paged_pool_destroy(pool));
  free(expected_model);
  free_problem(&expected);
}
