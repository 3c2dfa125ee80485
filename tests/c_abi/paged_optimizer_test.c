/* Optimizer steps over paged state: the results of steps over plain memory, and what they refuse. */
#include "qlora_native/c_api_paged_optimizer.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "optimizer_model.h"
#include "problem.h"

/* 64-bit platforms. A struct may grow at its end; nothing else here may change. */
#define OFFSET_IS(type, member, bytes) \
  _Static_assert(offsetof(type, member) == (bytes), #type "." #member " has moved")
OFFSET_IS(qn_paged_optimizer_args, step, 8);
OFFSET_IS(qn_paged_optimizer_args, pool, 16);
OFFSET_IS(qn_paged_optimizer_args, data, 24);
OFFSET_IS(qn_paged_optimizer_args, part_bytes, 48);
_Static_assert(sizeof(qn_paged_optimizer_args) == 56, "size");

enum { STATES = 6 };

/* A model whose state lies in a pool. */
typedef struct paged_model {
  model* m;
  qn_paged_pool* pool;
  void* data[STATES];
  int64_t sizes[STATES];
  qn_paged_optimizer_args args;
  int64_t workspace_bytes;
  void* workspace;
} paged_model;

static void* move_to_pool(paged_model* p, int state, const void* from, int64_t bytes) {
  p->sizes[state] = bytes;
  CHECK_OK(qn_paged_pool_allocate(p->pool, bytes, &p->data[state], NULL));
  return memcpy(p->data[state], from, (size_t)bytes);
}

static paged_model make_paged_model(int64_t part_bytes) {
  paged_model p = {.m = make_model()};
  model* const m = p.m;
  const qn_paged_pool_options options = {.struct_size = sizeof(options)};
  CHECK_OK(qn_paged_pool_create(&options, &p.pool));
  m->tensors[0].state1 = move_to_pool(&p, 0, m->moment, sizeof(m->moment));
  m->tensors[0].state2 = move_to_pool(&p, 1, m->square, sizeof(m->square));
  m->tensors[1].state1 = move_to_pool(&p, 2, m->moment_codes, sizeof(m->moment_codes));
  m->tensors[1].state2 = move_to_pool(&p, 3, m->square_codes, sizeof(m->square_codes));
  m->tensors[1].absmax1 = move_to_pool(&p, 4, m->absmax1, sizeof(m->absmax1));
  m->tensors[1].absmax2 = move_to_pool(&p, 5, m->absmax2, sizeof(m->absmax2));
  p.args = (qn_paged_optimizer_args){.struct_size = sizeof(p.args),
                                     .step = &m->args,
                                     .pool = p.pool,
                                     .count = STATES,
                                     .part_bytes = part_bytes};
  CHECK_OK(qn_optimizer_step_workspace_bytes(&m->args, &p.workspace_bytes));
  p.workspace = workspace_memory(p.workspace_bytes);
  return p;
}

static void free_paged_model(paged_model* p) {
  CHECK_OK(qn_paged_pool_destroy(p->pool));
  free(p->workspace);
  free(p->m);
}

static void test_steps(int64_t part_bytes) {
  paged_model paged = make_paged_model(part_bytes);
  paged.args.data = paged.data;
  paged.args.size_bytes = paged.sizes;
  model* const plain = make_model();
  for (int i = 0; i < 3; ++i) {
    CHECK_OK(qn_optimizer_step(&plain->args, paged.workspace, paged.workspace_bytes, NULL));
    CHECK_OK(qn_paged_optimizer_step(&paged.args, paged.workspace, paged.workspace_bytes, NULL));
  }
  const void* const expected[STATES] = {plain->moment,       plain->square,  plain->moment_codes,
                                        plain->square_codes, plain->absmax1, plain->absmax2};
  for (int s = 0; s < STATES; ++s) {
    CHECK_OK(qn_paged_pool_host_view(paged.pool, paged.data[s], paged.sizes[s], NULL));
    CHECK_BYTES(paged.data[s], expected[s], (size_t)paged.sizes[s]);
  }
  CHECK_BYTES(paged.m->param, plain->param, sizeof(plain->param));
  CHECK(paged.m->step[0] == 3.0f && paged.m->step[1] == 3.0f);
  free(plain);
  free_paged_model(&paged);
}

static void test_refusals(void) {
  paged_model p = make_paged_model(1 << 20);
  qn_paged_optimizer_args args = p.args;
  args.data = p.data;
  args.size_bytes = p.sizes;
  const qn_paged_optimizer_args valid = args;
  model* const before = make_model();
  memcpy(before, p.m, sizeof(*before));
  void* const first = p.data[0];
#define REFUSE(change, words)                                                                   \
  do {                                                                                          \
    change;                                                                                     \
    CHECK_REFUSED(qn_paged_optimizer_step(&args, p.workspace, p.workspace_bytes, NULL), words); \
    args = valid;                                                                               \
    memcpy(p.m, before, sizeof(*before));                                                       \
    p.data[0] = first;                                                                          \
    p.sizes[0] = SIZE * 4;                                                                      \
  } while (0)
  REFUSE(args.step = NULL, "args is null");
  REFUSE(args.pool = NULL, "pool is null");
  REFUSE(args.pool = (qn_paged_pool*)((char*)p.pool + 1), "pool is not aligned");
  REFUSE(args.data = NULL, "data is null");
  REFUSE(args.data = (void**)((char*)p.data + 1), "data is not aligned");
  REFUSE(args.size_bytes = NULL, "size_bytes is null");
  REFUSE(args.count = -1, "count is -1");
  REFUSE(args.part_bytes = 0, "part_bytes is 0");
  REFUSE(args.part_bytes = INT64_MIN, "part_bytes is -9223372036854775808");
  REFUSE(p.sizes[0] = -5, "an allocation of -5 bytes");
  REFUSE(p.sizes[0] = SIZE * 4 - 1,
         "state of 2800 bytes starts at byte 0 of an allocation of 2799");
  REFUSE(p.sizes[0] = 1 << 19, "does not lie in one live allocation");
  REFUSE(p.data[0] = NULL, "at 0");
  REFUSE(p.m->tensors[0].param = NULL, "param of tensor 0 is null");
  REFUSE(p.m->args.device_index = 3, "no device 3");
#undef REFUSE
  CHECK_REFUSED(qn_paged_optimizer_step(&args, NULL, 0, NULL), "the workspace has 0 bytes");
  CHECK_REFUSED(qn_paged_optimizer_step(&args, NULL, 8, NULL), "null address");
  CHECK_BYTES(p.m, before, sizeof(*before));
  CHECK(is_filled(first, 0, sizeof(before->moment)));
  CHECK_OK(qn_paged_optimizer_step(&args, p.workspace, p.workspace_bytes, NULL));
  CHECK(!is_filled(first, 0, sizeof(before->moment)));
  free(before);
  free_paged_model(&p);
}

void test_paged_optimizer(void) {
  test_steps(1);
  test_steps(3000);
  test_steps(1 << 20);
  test_refusals();
}
