/* Optimizer steps and norms from C, against plain loops, and what they refuse. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "optimizer_model.h"
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

/* Every function that takes these arguments refuses them. */
static void refuse_norm(const qn_gradient_norm_args* args, const char* words) {
  int64_t bytes = 77;
  char name[QN_KERNEL_NAME_BYTES] = "";
  CHECK_REFUSED(qn_gradient_norm(args, NULL, 0, NULL), words);
  CHECK_REFUSED(qn_gradient_norm_workspace_bytes(args, &bytes), words);
  CHECK_REFUSED(qn_gradient_norm_selected_kernel(args, name, sizeof(name)), words);
  CHECK(bytes == 77 && name[0] == '\0');
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
  const qn_gradient_norm_args valid = args;
  const void* misaligned[2] = {m->grad[0], (char*)m->grad[1] + 1};
  const int64_t negative[2] = {SIZE, -1}, huge[2] = {INT64_MAX, 1};
  const qn_dtype unknown[2] = {QN_FLOAT32, 3};
#define REFUSE(member, value, words) \
  do {                               \
    args.member = (value);           \
    refuse_norm(&args, words);       \
    args = valid;                    \
  } while (0)
  REFUSE(num_grads, -1, "the number of grads is -1");
  REFUSE(grads, NULL, "grads is null");
  REFUSE(grads, misaligned, "grad is not aligned");
  REFUSE(sizes, NULL, "sizes is null");
  REFUSE(sizes, negative, "-1");
  REFUSE(sizes, huge, "9223372036854775807");
  REFUSE(dtypes, NULL, "dtypes is null");
  REFUSE(dtypes, unknown, "dtype 3");
  REFUSE(norm, NULL, "norm is null");
  REFUSE(norm, (float*)((char*)&norm + 1), "norm is not aligned");
  REFUSE(device_type, 2, "device_type 2");
  REFUSE(device_index, -1, "no device -1");
#undef REFUSE
  CHECK_REFUSED(qn_gradient_norm(&args, NULL, 1, NULL), "null address");
  CHECK_REFUSED(qn_gradient_norm_workspace_bytes(&args, NULL), "workspace_bytes is null");
  CHECK_REFUSED(qn_gradient_norm_selected_kernel(&args, name, 0), "name has 0 bytes");
  CHECK(norm == 7.0f);
  free(m);
}

/* Every function that takes these arguments refuses them. */
static void refuse_step(const qn_optimizer_args* args, const char* words) {
  int64_t bytes = 77;
  char name[QN_KERNEL_NAME_BYTES] = "";
  CHECK_REFUSED(qn_optimizer_step(args, NULL, 0, NULL), words);
  CHECK_REFUSED(qn_optimizer_step_workspace_bytes(args, &bytes), words);
  CHECK_REFUSED(qn_optimizer_step_selected_kernel(args, name, sizeof(name)), words);
  CHECK(bytes == 77 && name[0] == '\0');
}

static void test_refusals(void) {
  model* m = make_model();
  model* before = malloc(sizeof(*before));
  memcpy(before, m, sizeof(*m));
#define REFUSE(change, words)      \
  do {                             \
    change;                        \
    refuse_step(&m->args, words);  \
    memcpy(m, before, sizeof(*m)); \
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
  REFUSE(m->tensors[0].grad = (char*)m->grad + 2, "grad is not aligned");
  REFUSE(m->tensors[0].step = NULL, "step of tensor 0 is null");
  REFUSE(m->tensors[0].numel = -1, "-1 elements");
  REFUSE(m->tensors[0].numel = INT64_MAX, "9223372036854775807 elements");
  REFUSE(m->tensors[0].first_element = 5, "5");
  REFUSE(m->tensors[0].absmax1 = m->absmax1, "absmax1 of tensor 0 is given");
  REFUSE(m->args.device_index = 1, "no device 1");
  REFUSE(m->args.num_groups = INT64_MIN, "the number of groups is -9223372036854775808");
  REFUSE(m->args.max_norm = NAN, "max_norm");
  REFUSE(m->group.beta1 = 1, "beta1 1");
  REFUSE(m->group.lr = INFINITY, "lr inf");
  REFUSE(m->group.lr_on_device = (float*)((char*)m->absmax1 + 1), "lr_on_device is not aligned");
#undef REFUSE
  CHECK_REFUSED(qn_optimizer_step(&m->args, NULL, 0, NULL), "the workspace has 0 bytes");
  CHECK_REFUSED(qn_optimizer_step(&m->args, NULL, 4096, NULL), "null address");
  CHECK_REFUSED(qn_optimizer_step(&m->args, (char*)NULL + 8, 4096, NULL), "not aligned to 256");
  CHECK_REFUSED(qn_optimizer_step_workspace_bytes(&m->args, NULL), "workspace_bytes is null");
  CHECK_REFUSED(qn_optimizer_step_selected_kernel(&m->args, NULL, 8), "name is null");
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
