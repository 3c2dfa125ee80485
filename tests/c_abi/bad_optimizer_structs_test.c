/* struct_size in the functions of optimizers and paged memory, as bad_structs_test.c. */
#include <stdlib.h>
#include <string.h>

#include "qlora_native/c_api_memory.h"
#include "qlora_native/c_api_paged_optimizer.h"

#include "check.h"
#include "optimizer_model.h"
#include "problem.h"
#include "struct_check.h"

static model* m;
static model* before;
static void* workspace;
static int64_t workspace_bytes, answer;
static char name[QN_KERNEL_NAME_BYTES];
static float norm;
static qn_optimizer_args step_args;
static qn_optimizer_tensor tensor;
static qn_optimizer_group group;
static const void* grads[1];
static int64_t sizes[1];
static qn_dtype dtypes[1];
static qn_gradient_norm_args norm_args;
static qn_paged_pool* pool;
static qn_paged_pool_options options;
static qn_paged_optimizer_args paged_args;

static void set_up(void) {
  m = make_model();
  before = make_model();
  memcpy(before, m, sizeof(*m));
  step_args = m->args;
  tensor = m->tensors[1];
  group = m->group;
  norm = 7.0f;
  grads[0] = m->grad[0];
  sizes[0] = SIZE;
  norm_args = (qn_gradient_norm_args){.struct_size = sizeof(norm_args),
                                      .grads = grads,
                                      .sizes = sizes,
                                      .dtypes = dtypes,
                                      .num_grads = 1,
                                      .norm = &norm};
  workspace_bytes = 1 << 16;
  workspace = workspace_memory(workspace_bytes);
  options = (qn_paged_pool_options){.struct_size = sizeof(options)};
  CHECK_OK(qn_paged_pool_create(&options, &pool));
  paged_args = (qn_paged_optimizer_args){
      .struct_size = sizeof(paged_args), .step = &m->args, .pool = pool, .part_bytes = 1};
  answer = 77;
  memset(name, UNTOUCHED, sizeof(name));
}

static void tear_down(void) {
  CHECK_OK(qn_paged_pool_destroy(pool));
  free(workspace);
  free(before);
  free(m);
}

static bool is_untouched(void) {
  return memcmp(m, before, sizeof(*m)) == 0 && norm == 7.0f && answer == 77 &&
         is_filled(name, UNTOUCHED, sizeof(name));
}

static const struct_fixture fixture = {set_up, tear_down, is_untouched};

/* ---- One call per function and struct ---- */

static qn_status step(void* s) { return qn_optimizer_step(s, workspace, workspace_bytes, NULL); }
static qn_status step_bytes(void* s) { return qn_optimizer_step_workspace_bytes(s, &answer); }
static qn_status step_name(void* s) {
  return qn_optimizer_step_selected_kernel(s, name, sizeof(name));
}
static qn_status step_tensor(void* s) {
  const qn_optimizer_tensor* tensors[2] = {&m->tensors[0], s};
  qn_optimizer_args args = m->args;
  args.tensors = tensors;
  return step(&args);
}
static qn_status step_group(void* s) {
  const qn_optimizer_group* groups[1] = {s};
  qn_optimizer_args args = m->args;
  args.groups = groups;
  return step(&args);
}

static qn_status norm_run(void* s) { return qn_gradient_norm(s, workspace, workspace_bytes, NULL); }
static qn_status norm_bytes(void* s) { return qn_gradient_norm_workspace_bytes(s, &answer); }
static qn_status norm_name(void* s) {
  return qn_gradient_norm_selected_kernel(s, name, sizeof(name));
}

static qn_status paged_step(void* s) {
  return qn_paged_optimizer_step(s, workspace, workspace_bytes, NULL);
}
static qn_status paged_step_args(void* s) {
  qn_paged_optimizer_args args = paged_args;
  args.step = s;
  return paged_step(&args);
}

static qn_status create(void* s) {
  qn_paged_pool* created = NULL;
  const qn_status status = qn_paged_pool_create(s, &created);
  CHECK((status == QN_OK) == (created != NULL));
  CHECK_OK(qn_paged_pool_destroy(created));
  return status;
}
static qn_status stats(void* s) { return qn_describe_paged_pool(pool, s); }

#define TEST_INPUT(call, valid) test_struct(&fixture, call, &(valid), sizeof(valid))

void test_bad_optimizer_structs(void) {
  test_output_struct(&fixture, stats, sizeof(qn_paged_pool_stats));
  TEST_INPUT(create, options);
  TEST_INPUT(step, step_args);
  TEST_INPUT(step_bytes, step_args);
  TEST_INPUT(step_name, step_args);
  TEST_INPUT(step_tensor, tensor);
  TEST_INPUT(step_group, group);
  TEST_INPUT(norm_run, norm_args);
  TEST_INPUT(norm_bytes, norm_args);
  TEST_INPUT(norm_name, norm_args);
  TEST_INPUT(paged_step, paged_args);
  TEST_INPUT(paged_step_args, step_args);
}
