/* Optimizer steps and norms from C, against plain loops, and what they refuse. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "qlora_native/c_api_optimizer.h"

#include "check.h"
#include "problem.h"

/* 64-bit platforms. A struct may grow at its end; nothing else here may change. */
#define OFFSET_IS(type, member, bytes) \
  _Static_assert(offsetof(type, member) == (bytes), #type "." #member " has moved")
OFFSET_IS(qn_optimizer_tensor, numel, 72);
OFFSET_IS(qn_optimizer_tensor, param_dtype, 88);
OFFSET_IS(qn_optimizer_tensor, keeps_step, 108);
OFFSET_IS(qn_optimizer_group, lr_on_device, 48);
OFFSET_IS(qn_optimizer_args, grad_scale, 40);
OFFSET_IS(qn_optimizer_args, algorithm, 80);
OFFSET_IS(qn_gradient_norm_args, norm, 40);
_Static_assert(sizeof(qn_optimizer_tensor) == 112 && sizeof(qn_optimizer_group) == 64, "size");
_Static_assert(sizeof(qn_optimizer_args) == 104 && sizeof(qn_gradient_norm_args) == 56, "size");

enum { SIZE = 700, BLOCKS = 3 };

/* One tensor with fp32 state and one with 8-bit state. */
typedef struct model {
  float param[2][SIZE], grad[2][SIZE], moment[SIZE], square[SIZE], step[2];
  uint8_t moment_codes[SIZE], square_codes[SIZE];
  float absmax1[BLOCKS], absmax2[BLOCKS];
  qn_optimizer_tensor tensors[2];
  qn_optimizer_group group;
  const qn_optimizer_tensor* tensor_list[2];
  const qn_optimizer_group* group_list[1];
  qn_optimizer_args args;
} model;

static model* make_model(void) {
  model* m = calloc(1, sizeof(*m));
  uint32_t state = 1;
  for (int t = 0; t < 2; ++t) {
    for (int i = 0; i < SIZE; ++i) {
      m->param[t][i] = number(&state);
      m->grad[t][i] = number(&state);
    }
  }
  memset(m->moment_codes, 127, sizeof(m->moment_codes));
  m->tensors[0] = (qn_optimizer_tensor){.struct_size = sizeof(qn_optimizer_tensor),
                                        .param = m->param[0],
                                        .grad = m->grad[0],
                                        .state1 = m->moment,
                                        .state2 = m->square,
                                        .step = &m->step[0],
                                        .numel = SIZE};
  m->tensors[1] = (qn_optimizer_tensor){.struct_size = sizeof(qn_optimizer_tensor),
                                        .param = m->param[1],
                                        .grad = m->grad[1],
                                        .state1 = m->moment_codes,
                                        .state2 = m->square_codes,
                                        .absmax1 = m->absmax1,
                                        .absmax2 = m->absmax2,
                                        .step = &m->step[1],
                                        .numel = SIZE,
                                        .state_format = QN_STATE_DYNAMIC_8BIT};
  m->group = (qn_optimizer_group){.struct_size = sizeof(qn_optimizer_group),
                                  .lr = 0.01,
                                  .beta1 = 0.9,
                                  .beta2 = 0.999,
                                  .eps = 1e-8,
                                  .weight_decay = 0.1};
  for (int t = 0; t < 2; ++t) m->tensor_list[t] = &m->tensors[t];
  m->group_list[0] = &m->group;
  m->args = (qn_optimizer_args){.struct_size = sizeof(qn_optimizer_args),
                                .tensors = m->tensor_list,
                                .groups = m->group_list,
                                .num_tensors = 2,
                                .num_groups = 1};
  return m;
}

static void step(model* m) {
  int64_t bytes = 0;
  CHECK_OK(qn_optimizer_step_workspace_bytes(&m->args, &bytes));
  void* workspace = workspace_memory(bytes);
  CHECK_OK(qn_optimizer_step(&m->args, workspace, bytes, NULL));
  free(workspace);
}

static void test_step(void) {
  model* m = make_model();
  float start[2][SIZE];
  memcpy(start, m->param, sizeof(start));
  step(m);
  for (int t = 0; t < 2; ++t) {
    CHECK(m->step[t] == 1.0f);
    for (int i = 0; i < SIZE; ++i) {
      const double g = m->grad[t][i];
      /* In the first step both corrections undo the decays. */
      const double expected = start[t][i] * (1 - 0.01 * 0.1) - 0.01 * g / (fabs(g) + 1e-8);
      CHECK(fabs(m->param[t][i] - expected) < 1e-6);
    }
  }
  float map[256], unsigned_map[256];
  CHECK_OK(qn_signed_dynamic_map(map));
  CHECK_OK(qn_unsigned_dynamic_map(unsigned_map));
  for (int i = 0; i < SIZE; ++i) {
    const double moment = 0.1 * m->grad[1][i], square = 0.001 * m->grad[1][i] * m->grad[1][i];
    /* Codes are at most 1/64 apart, relative to the largest of the block. */
    CHECK(fabs(map[m->moment_codes[i]] * m->absmax1[i / 256] - moment) <
          0.008 * m->absmax1[i / 256]);
    CHECK(fabs(unsigned_map[m->square_codes[i]] * m->absmax2[i / 256] - square) <
          0.004 * m->absmax2[i / 256]);
  }
  char name[QN_KERNEL_NAME_BYTES], last[QN_KERNEL_NAME_BYTES];
  CHECK_OK(qn_optimizer_step_selected_kernel(&m->args, name, sizeof(name)));
  CHECK_OK(qn_last_kernel(QN_OPTIMIZER_STEP, last, sizeof(last)));
  CHECK(strcmp(name, last) == 0);
  free(m);
}

static void test_conditions(void) {
  model* m = make_model();
  model* before = malloc(sizeof(*before));
  float found_inf = 1.0f, norm = INFINITY, lr = 0.0f;
  m->args.found_inf = &found_inf;
  memcpy(before, m, sizeof(*m));
  step(m);
  CHECK_BYTES(m, before, sizeof(*m));
  m->args.found_inf = NULL;
  m->args.grad_norm = &norm;
  m->args.skip_nonfinite = 1;
  memcpy(before, m, sizeof(*m));
  step(m);
  CHECK_BYTES(m, before, sizeof(*m));
  norm = 2.0f;
  m->group.lr_on_device = &lr;
  step(m);
  CHECK(m->step[0] == 1.0f);
  CHECK_BYTES(m->param, before->param, sizeof(m->param));
  free(before);
  free(m);
}

static void test_norm(void) {
  model* m = make_model();
  const void* grads[2] = {m->grad[0], m->grad[1]};
  const int64_t sizes[2] = {SIZE, 3};
  const qn_dtype dtypes[2] = {QN_FLOAT32, QN_FLOAT32};
  float norm = 0.0f;
  qn_gradient_norm_args args = {.struct_size = sizeof(args),
                                .grads = grads,
                                .sizes = sizes,
                                .dtypes = dtypes,
                                .num_grads = 2,
                                .norm = &norm};
  int64_t bytes = 0;
  CHECK_OK(qn_gradient_norm_workspace_bytes(&args, &bytes));
  void* workspace = workspace_memory(bytes);
  CHECK_OK(qn_gradient_norm(&args, workspace, bytes, NULL));
  free(workspace);
  double sum = 0;
  for (int i = 0; i < SIZE; ++i) sum += (double)m->grad[0][i] * m->grad[0][i];
  for (int i = 0; i < 3; ++i) sum += (double)m->grad[1][i] * m->grad[1][i];
  CHECK(fabs(norm - sqrt(sum)) < 1e-6 * sqrt(sum));
  char name[QN_KERNEL_NAME_BYTES];
  CHECK_OK(qn_gradient_norm_selected_kernel(&args, name, sizeof(name)));
  CHECK(name[0] != '\0');

  norm = 7.0f;
  args.num_grads = -1;
  CHECK_REFUSED(qn_gradient_norm(&args, NULL, 0, NULL), "the number of grads is -1");
  args.num_grads = 2;
  args.grads = NULL;
  CHECK_REFUSED(qn_gradient_norm(&args, NULL, 0, NULL), "grads is null");
  args.grads = grads;
  args.dtypes = NULL;
  CHECK_REFUSED(qn_gradient_norm(&args, NULL, 0, NULL), "dtypes is null");
  args.dtypes = dtypes;
  args.norm = NULL;
  CHECK_REFUSED(qn_gradient_norm(&args, NULL, 0, NULL), "norm is null");
  CHECK(norm == 7.0f);
  free(m);
}

static void test_refusals(void) {
  model* m = make_model();
  model* before = malloc(sizeof(*before));
  memcpy(before, m, sizeof(*m));
#define REFUSE(change, words)                                         \
  do {                                                                \
    change;                                                           \
    CHECK_REFUSED(qn_optimizer_step(&m->args, NULL, 0, NULL), words); \
    memcpy(m, before, sizeof(*m));                                    \
  } while (0)
  REFUSE(m->args.struct_size = 8, "args has struct_size 8");
  REFUSE(m->tensors[1].struct_size = 8, "a tensor has struct_size 8");
  REFUSE(m->group.struct_size = 8, "a group has struct_size 8");
  REFUSE(m->args.num_tensors = -2, "the number of tensors is -2");
  REFUSE(m->args.tensors = NULL, "tensors is null");
  REFUSE(m->args.groups = NULL, "groups is null");
  REFUSE(m->tensor_list[1] = NULL, "a tensor is null");
  REFUSE(m->args.algorithm = 2, "algorithm");
  REFUSE(m->args.device_type = 5, "device");
  REFUSE(m->args.skip_nonfinite = 2, "skip_nonfinite");
  REFUSE(m->args.reserved = 1, "reserved of args");
  REFUSE(m->group.reserved = 1, "reserved of a group");
  REFUSE(m->group.maximize = -1, "maximize");
  REFUSE(m->tensors[0].param_dtype = 3, "dtype");
  REFUSE(m->tensors[0].state_format = 2, "state_format");
  REFUSE(m->tensors[0].keeps_step = 7, "keeps_step");
  REFUSE(m->tensors[0].param = (char*)m->param + 1, "param is not aligned");
  REFUSE(m->tensors[0].state1 = NULL, "state1 of tensor 0 is null");
  REFUSE(m->tensors[1].group = 1, "group 1");
  REFUSE(m->args.max_norm = 1, "need grad_norm");
  REFUSE((void)m, "the workspace has 0 bytes");
#undef REFUSE
  CHECK_BYTES(m, before, sizeof(*m));
  free(before);
  free(m);
}

void test_optimizer(void) {
  test_step();
  test_conditions();
  test_norm();
  test_refusals();
}
