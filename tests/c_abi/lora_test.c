/* The adapters' operations from C, against plain loops, and what they refuse. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "qlora_native/c_api_lora.h"

#include "check.h"
#include "problem.h"

/* 64-bit platforms. A struct may grow at its end; nothing else here may change. */
#define OFFSET_IS(type, member, bytes) \
  _Static_assert(offsetof(type, member) == (bytes), #type "." #member " has moved")
OFFSET_IS(qn_lora_project_args, m, 56);
OFFSET_IS(qn_lora_project_args, dropout_p, 96);
OFFSET_IS(qn_lora_project_args, device_index, 120);
OFFSET_IS(qn_lora_update_args, y, 24);
OFFSET_IS(qn_lora_gradient_args, transposed, 112);
OFFSET_IS(qn_lora_forward_args, y, 56);
OFFSET_IS(qn_lora_forward_args, dtype, 144);
OFFSET_IS(qn_lora_backward_args, db, 72);
OFFSET_IS(qn_lora_backward_args, dtype, 184);
_Static_assert(sizeof(qn_lora_project_args) == 128 && sizeof(qn_lora_update_args) == 128, "size");
_Static_assert(sizeof(qn_lora_gradient_args) == 128 && sizeof(qn_lora_forward_args) == 160, "size");
_Static_assert(sizeof(qn_lora_backward_args) == 208, "size");

enum { M = 3, N = 10, K = 64, R = 4 };
static const float scaling = 0.5f;

/* Inputs, outputs and arguments of every operation, fp32 and without dropout. */
typedef struct model {
  problem p;
  float x[M * K], dy[M * N], a[R * K], b[N * R], bias[N];
  float t[M * R], y[M * N], dx[M * K], da[R * K], db[N * R];
  qn_lora_project_args project;   /* t of x and a */
  qn_lora_update_args update;     /* y of t and b */
  qn_lora_gradient_args gradient; /* da of t, in u's place, and x */
  qn_lora_forward_args forward;
  qn_lora_backward_args backward;
} model;

static void fill(float* values, size_t count, uint32_t* state) {
  for (size_t i = 0; i < count; ++i) values[i] = number(state);
}

static void clear_outputs(model* m) {
  float* const outputs[] = {m->t, m->y, m->dx, m->da, m->db};
  const size_t sizes[] = {sizeof(m->t), sizeof(m->y), sizeof(m->dx), sizeof(m->da), sizeof(m->db)};
  for (int i = 0; i < 5; ++i) memset(outputs[i], UNTOUCHED, sizes[i]);
}

static model* make_model(void) {
  model* m = calloc(1, sizeof(*m));
  uint32_t state = 1;
  m->p = make_problem(N, K, 64, QN_NF4, true);
  quantize(&m->p);
  dequantize(&m->p);
  fill(m->x, M * K, &state);
  fill(m->dy, M * N, &state);
  fill(m->a, R * K, &state);
  fill(m->b, N * R, &state);
  fill(m->bias, N, &state);
  clear_outputs(m);
  m->project = (qn_lora_project_args){.struct_size = sizeof(m->project),
                                      .x = m->x,
                                      .factor = m->a,
                                      .t = m->t,
                                      .x_row_stride = K,
                                      .factor_row_stride = K,
                                      .t_row_stride = R,
                                      .m = M,
                                      .c = K,
                                      .r = R,
                                      .scaling = scaling};
  m->update = (qn_lora_update_args){.struct_size = sizeof(m->update),
                                    .t = m->a,
                                    .factor = m->b,
                                    .y = m->y,
                                    .t_row_stride = R,
                                    .factor_row_stride = R,
                                    .y_row_stride = N,
                                    .m = M,
                                    .c = N,
                                    .r = R,
                                    .scaling = scaling};
  m->gradient = (qn_lora_gradient_args){.struct_size = sizeof(m->gradient),
                                        .s = m->a,
                                        .v = m->x,
                                        .grad = m->da,
                                        .s_row_stride = R,
                                        .v_row_stride = K,
                                        .grad_row_stride = K,
                                        .m = M,
                                        .c = K,
                                        .r = R,
                                        .scaling = scaling};
  m->forward = (qn_lora_forward_args){.struct_size = sizeof(m->forward),
                                      .x = m->x,
                                      .weight = &m->p.weight,
                                      .bias = m->bias,
                                      .a = m->a,
                                      .b = m->b,
                                      .t = m->t,
                                      .y = m->y,
                                      .x_row_stride = K,
                                      .a_row_stride = K,
                                      .b_row_stride = R,
                                      .t_row_stride = R,
                                      .y_row_stride = N,
                                      .m = M,
                                      .r = R,
                                      .scaling = scaling};
  m->backward = (qn_lora_backward_args){.struct_size = sizeof(m->backward),
                                        .dy = m->dy,
                                        .x = m->x,
                                        .t = m->t,
                                        .weight = &m->p.weight,
                                        .a = m->a,
                                        .b = m->b,
                                        .dx = m->dx,
                                        .da = m->da,
                                        .db = m->db,
                                        .dy_row_stride = N,
                                        .x_row_stride = K,
                                        .t_row_stride = R,
                                        .a_row_stride = K,
                                        .b_row_stride = R,
                                        .dx_row_stride = K,
                                        .da_row_stride = K,
                                        .db_row_stride = R,
                                        .m = M,
                                        .r = R,
                                        .scaling = scaling};
  return m;
}

static void free_model(model* m) {
  free_problem(&m->p);
  free(m);
}

/* Runs an operation with just the workspace that it asks for. */
#define RUN(operation, args)                               \
  do {                                                     \
    int64_t bytes = -1;                                    \
    CHECK_OK(operation##_workspace_bytes((args), &bytes)); \
    void* workspace = workspace_memory(bytes);             \
    CHECK_OK(operation((args), workspace, bytes, NULL));   \
    free(workspace);                                       \
  } while (0)

/* The sum of a[i * a_step] * b[i * b_step]. */
static double dot(const float* a, int a_step, const float* b, int b_step, int count) {
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += (double)a[i * a_step] * b[i * b_step];
  return sum;
}

static void check_near(const float* actual, double expected, const char* what) {
  if (!(fabs(*actual - expected) < 1e-4)) check_that(false, what, __FILE__, __LINE__);
}

static void test_passes(void) {
  model* m = make_model();
  RUN(qn_lora_project, &m->project);
  for (int i = 0; i < M * R; ++i) {
    check_near(&m->t[i], scaling * dot(m->x + i / R * K, 1, m->a + i % R * K, 1, K), "t");
  }
  for (int i = 0; i < M * N; ++i) m->y[i] = 2.0f;
  RUN(qn_lora_update, &m->update);
  for (int i = 0; i < M * N; ++i) {
    check_near(&m->y[i], 2 + scaling * dot(m->a + i / N * R, 1, m->b + i % N * R, 1, R), "y");
  }
  RUN(qn_lora_gradient, &m->gradient);
  for (int i = 0; i < R * K; ++i) {
    check_near(&m->da[i], scaling * dot(m->a + i / K, R, m->x + i % K, K, M), "da");
  }
  /* Everything is dropped. */
  m->project.dropout_p = m->update.dropout_p = m->gradient.dropout_p = 1.0f;
  float before[M * N];
  memcpy(before, m->y, sizeof(before));
  RUN(qn_lora_project, &m->project);
  RUN(qn_lora_update, &m->update);
  RUN(qn_lora_gradient, &m->gradient);
  for (int i = 0; i < M * R; ++i) CHECK(m->t[i] == 0.0f);
  for (int i = 0; i < R * K; ++i) CHECK(m->da[i] == 0.0f);
  CHECK_BYTES(m->y, before, sizeof(before));
  free_model(m);
}

static void test_forward_and_backward(void) {
  model* m = make_model();
  RUN(qn_lora_forward, &m->forward);
  for (int i = 0; i < M * N; ++i) {
    const float* const x = m->x + i / N * K;
    double expected = m->bias[i % N] + dot(x, 1, m->p.decoded + i % N * K, 1, K);
    for (int j = 0; j < R; ++j) {
      expected += scaling * dot(x, 1, m->a + j * K, 1, K) * m->b[i % N * R + j];
    }
    check_near(&m->y[i], expected, "y");
  }
  RUN(qn_lora_backward, &m->backward);
  float u[M * R];
  for (int i = 0; i < M * R; ++i) {
    u[i] = (float)(scaling * dot(m->dy + i / R * N, 1, m->b + i % R, R, N));
  }
  for (int i = 0; i < M * K; ++i) {
    const double expected = dot(m->dy + i / K * N, 1, m->p.decoded + i % K, K, N) +
                            dot(u + i / K * R, 1, m->a + i % K, K, R);
    check_near(&m->dx[i], expected, "dx");
  }
  for (int i = 0; i < R * K; ++i)
    check_near(&m->da[i], dot(u + i / K, R, m->x + i % K, K, M), "da");
  for (int i = 0; i < N * R; ++i) {
    check_near(&m->db[i], scaling * dot(m->dy + i / R, N, m->t + i % R, R, M), "db");
  }

  /* Without t nothing else changes; of what is not wanted nothing is looked at. */
  float y[M * N], db[N * R];
  memcpy(y, m->y, sizeof(y));
  memcpy(db, m->db, sizeof(db));
  m->forward.t = NULL;
  m->forward.t_row_stride = -1;
  RUN(qn_lora_forward, &m->forward);
  CHECK_BYTES(m->y, y, sizeof(y));
  memset(m->db, UNTOUCHED, sizeof(m->db));
  m->backward.dx = m->backward.da = NULL;
  m->backward.a = m->backward.b = m->backward.x = NULL;
  m->backward.a_dtype = m->backward.b_dtype = m->backward.da_dtype = 99;
  RUN(qn_lora_backward, &m->backward);
  CHECK_BYTES(m->db, db, sizeof(db));
  free_model(m);
}

static void test_questions(void) {
  model* m = make_model();
  char name[QN_KERNEL_NAME_BYTES], last[QN_KERNEL_NAME_BYTES];
  qn_matmul_plan plan = {.struct_size = sizeof(plan)};
  int64_t bytes = -1;
#define ASK(operation, op, args)                                       \
  do {                                                                 \
    RUN(operation, args);                                              \
    CHECK_OK(operation##_selected_kernel((args), name, sizeof(name))); \
    CHECK_OK(qn_last_kernel(op, last, sizeof(last)));                  \
    CHECK(strcmp(name, last) == 0);                                    \
    CHECK_OK(operation##_plan((args), &plan));                         \
    CHECK_OK(operation##_workspace_bytes((args), &bytes));             \
    CHECK(plan.workspace_bytes == bytes);                              \
    (args)->dropout_p = 0.5f;                                          \
    CHECK_OK(operation##_plan((args), &plan));                         \
    CHECK(plan.prefers_dense == 0);                                    \
  } while (0)
  ASK(qn_lora_project, QN_LORA_PROJECT, &m->project);
  ASK(qn_lora_update, QN_LORA_UPDATE, &m->update);
  ASK(qn_lora_gradient, QN_LORA_GRADIENT, &m->gradient);
#undef ASK
  free_model(m);
}

/* Every function of an operation refuses the change, and touches nothing. */
#define REFUSE(operation, member, change, words)                                                   \
  do {                                                                                             \
    model* m = make_model();                                                                       \
    change;                                                                                        \
    int64_t bytes = 77;                                                                            \
    CHECK_REFUSED(operation(&m->member, NULL, 0, NULL), words);                                    \
    CHECK_REFUSED(operation##_workspace_bytes(&m->member, &bytes), words);                         \
    CHECK(                                                                                         \
        bytes == 77 && is_filled(m->t, UNTOUCHED, sizeof(m->t)) &&                                 \
        is_filled(m->y, UNTOUCHED, sizeof(m->y)) && is_filled(m->dx, UNTOUCHED, sizeof(m->dx)) &&  \
        is_filled(m->da, UNTOUCHED, sizeof(m->da)) && is_filled(m->db, UNTOUCHED, sizeof(m->db))); \
    free_model(m);                                                                                 \
  } while (0)
#define REFUSE_PASS(operation, member, change, words)                                  \
  do {                                                                                 \
    REFUSE(operation, member, change, words);                                          \
    model* m = make_model();                                                           \
    change;                                                                            \
    char name[QN_KERNEL_NAME_BYTES] = "";                                              \
    qn_matmul_plan plan = {.struct_size = sizeof(plan), .workspace_bytes = 77};        \
    CHECK_REFUSED(operation##_plan(&m->member, &plan), words);                         \
    CHECK_REFUSED(operation##_selected_kernel(&m->member, name, sizeof(name)), words); \
    CHECK(plan.workspace_bytes == 77 && name[0] == '\0');                              \
    free_model(m);                                                                     \
  } while (0)

static void test_refused_nothing(void) {
  int64_t bytes = 0;
  char name[32];
  qn_matmul_plan plan = {.struct_size = sizeof(plan)};
  CHECK_REFUSED(qn_lora_project(NULL, NULL, 0, NULL), "args is null");
  CHECK_REFUSED(qn_lora_project_workspace_bytes(NULL, &bytes), "args is null");
  CHECK_REFUSED(qn_lora_update(NULL, NULL, 0, NULL), "args is null");
  CHECK_REFUSED(qn_lora_update_workspace_bytes(NULL, &bytes), "args is null");
  CHECK_REFUSED(qn_lora_gradient(NULL, NULL, 0, NULL), "args is null");
  CHECK_REFUSED(qn_lora_gradient_workspace_bytes(NULL, &bytes), "args is null");
  CHECK_REFUSED(qn_lora_forward_workspace_bytes(NULL, &bytes), "args is null");
  CHECK_REFUSED(qn_lora_backward_workspace_bytes(NULL, &bytes), "args is null");
  CHECK_REFUSED(qn_lora_project_plan(NULL, &plan), "args is null");
  CHECK_REFUSED(qn_lora_project_selected_kernel(NULL, name, sizeof(name)), "args is null");
  CHECK_REFUSED(qn_lora_update_plan(NULL, &plan), "args is null");
  CHECK_REFUSED(qn_lora_update_selected_kernel(NULL, name, sizeof(name)), "args is null");
  CHECK_REFUSED(qn_lora_gradient_plan(NULL, &plan), "args is null");
  CHECK_REFUSED(qn_lora_gradient_selected_kernel(NULL, name, sizeof(name)), "args is null");
}

/* What the three passes refuse alike. */
#define REFUSE_COMMON(operation, member, flag)                                           \
  do {                                                                                   \
    REFUSE_PASS(operation, member, m->member.struct_size = 8, "args has struct_size 8"); \
    REFUSE_PASS(operation, member, m->member.m = -1, "-1");                              \
    REFUSE_PASS(operation, member, m->member.c = INT64_MAX, "row stride");               \
    REFUSE_PASS(operation, member, m->member.dtype = 3, "dtype");                        \
    REFUSE_PASS(operation, member, m->member.flag = 2, #flag);                           \
    REFUSE_PASS(operation, member, m->member.device_type = 7, "device");                 \
    REFUSE_PASS(operation, member, m->member.device_index = 1, "device 1");              \
    REFUSE_PASS(operation, member, m->member.reserved = 1, "reserved of args");          \
    REFUSE_PASS(operation, member, m->member.dropout_p = 1.5f, "1.5");                   \
    REFUSE_PASS(operation, member, m->member.scaling = NAN, "nan");                      \
  } while (0)

static void* odd(const void* data) { return (char*)(uintptr_t)data + 1; }

static void test_refused_passes(void) {
  REFUSE_COMMON(qn_lora_project, project, factor_transposed);
  REFUSE_PASS(qn_lora_project, project, m->project.x = NULL, "x is null");
  REFUSE_PASS(qn_lora_project, project, m->project.x = odd(m->x), "x is not aligned");
  REFUSE_PASS(qn_lora_project, project, m->project.factor = odd(m->a), "factor is not aligned");
  REFUSE_PASS(qn_lora_project, project, m->project.t = odd(m->t), "t is not aligned");
  REFUSE_PASS(qn_lora_project, project, m->project.factor_dtype = QN_BFLOAT16, "bfloat16");
  REFUSE_PASS(qn_lora_project, project, m->project.x_row_stride = 5, "row stride 5");

  REFUSE_COMMON(qn_lora_update, update, factor_transposed);
  REFUSE_PASS(qn_lora_update, update, m->update.y = NULL, "y is null");
  REFUSE_PASS(qn_lora_update, update, m->update.t = odd(m->a), "t is not aligned");
  REFUSE_PASS(qn_lora_update, update, m->update.factor_dtype = QN_FLOAT16, "float16");
  REFUSE_PASS(qn_lora_update, update, m->update.t_row_stride = 1, "row stride 1");

  REFUSE_COMMON(qn_lora_gradient, gradient, transposed);
  REFUSE_PASS(qn_lora_gradient, gradient, m->gradient.s = NULL, "s is null");
  REFUSE_PASS(qn_lora_gradient, gradient, m->gradient.grad = odd(m->da), "grad is not aligned");
  REFUSE_PASS(qn_lora_gradient, gradient, m->gradient.grad_dtype = QN_BFLOAT16, "bfloat16");
  REFUSE_PASS(qn_lora_gradient, gradient, m->gradient.grad_row_stride = 1, "row stride 1");
}

static void test_refused_whole(void) {
  REFUSE(qn_lora_forward, forward, m->forward.struct_size = 8, "args has struct_size 8");
  REFUSE(qn_lora_forward, forward, m->forward.reserved = 1, "reserved of args");
  REFUSE(qn_lora_forward, forward, m->forward.weight = NULL, "weight is null");
  REFUSE(qn_lora_forward, forward, m->p.weight.block_size = 63, "block_size 63");
  REFUSE(qn_lora_forward, forward, m->forward.x = NULL, "x is null");
  REFUSE(qn_lora_forward, forward, m->forward.y = odd(m->y), "y is not aligned");
  REFUSE(qn_lora_forward, forward, m->forward.bias = odd(m->bias), "bias is not aligned");
  REFUSE(qn_lora_forward, forward, m->forward.a = NULL, "a is null");
  REFUSE(qn_lora_forward, forward, m->forward.b_dtype = QN_FLOAT16, "b is float16");
  REFUSE(qn_lora_forward, forward, m->forward.t_row_stride = 3, "t has row stride 3");
  REFUSE(qn_lora_forward, forward, m->forward.dtype = -1, "dtype");
  REFUSE(qn_lora_forward, forward, m->forward.dropout_p = -1.0f, "-1");
  REFUSE(qn_lora_forward, forward, m->forward.m = -2, "-2");

  REFUSE(qn_lora_backward, backward, m->backward.struct_size = 8, "args has struct_size 8");
  REFUSE(qn_lora_backward, backward, m->backward.reserved = 1, "reserved of args");
  REFUSE(qn_lora_backward, backward, m->backward.weight = NULL, "weight is null");
  REFUSE(qn_lora_backward, backward, m->backward.dy = NULL, "dy is null");
  REFUSE(qn_lora_backward, backward, m->backward.x = NULL, "x is null");
  REFUSE(qn_lora_backward, backward, m->backward.t = NULL, "t is null");
  REFUSE(qn_lora_backward, backward, m->backward.b = NULL, "b is null");
  REFUSE(qn_lora_backward, backward, m->backward.da_dtype = QN_BFLOAT16, "da is bfloat16");
  REFUSE(qn_lora_backward, backward, m->backward.dx_row_stride = 1, "dx has row stride 1");
  REFUSE(qn_lora_backward, backward, m->backward.db = odd(m->db), "db is not aligned");
  REFUSE(qn_lora_backward, backward, m->backward.scaling = INFINITY, "inf");
}

static void test_refused_workspaces(void) {
  model* m = make_model();
  int64_t bytes = 0;
  CHECK_OK(qn_lora_backward_workspace_bytes(&m->backward, &bytes));
  CHECK(bytes > 0);
  unsigned char* workspace = workspace_memory(bytes + 8);
  CHECK_REFUSED(qn_lora_backward(&m->backward, workspace, bytes - 1, NULL), "the workspace has");
  CHECK_REFUSED(qn_lora_backward(&m->backward, NULL, bytes, NULL), "null address");
  CHECK_REFUSED(qn_lora_backward(&m->backward, workspace + 8, bytes, NULL), "not aligned to 256");
  CHECK_REFUSED(qn_lora_forward(&m->forward, workspace, 0, NULL), "the workspace has 0 bytes");
  CHECK_REFUSED(qn_lora_backward_workspace_bytes(&m->backward, NULL), "workspace_bytes is null");
  CHECK_REFUSED(qn_lora_project_plan(&m->project, NULL), "plan is null");
  CHECK_REFUSED(qn_lora_update_selected_kernel(&m->update, NULL, 9), "name is null");
  CHECK(is_filled(m->dx, UNTOUCHED, sizeof(m->dx)) && is_filled(m->y, UNTOUCHED, sizeof(m->y)));
  free(workspace);
  free_model(m);
}

void test_lora(void) {
  test_passes();
  test_forward_and_backward();
  test_questions();
  test_refused_nothing();
  test_refused_passes();
  test_refused_whole();
  test_refused_workspaces();
}
