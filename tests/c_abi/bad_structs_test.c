/* struct_size, in every function that takes a struct: which are accepted, and that nothing is
 * touched otherwise. And the layout of every struct, which is part of the ABI. */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "problem.h"
#include "struct_check.h"

/* 64-bit platforms. A struct may grow at its end; nothing else here may change. */
#define OFFSET_IS(type, member, bytes) \
  _Static_assert(offsetof(type, member) == (bytes), #type "." #member " has moved")
OFFSET_IS(qn_build_info, cuda_architectures, 32);
OFFSET_IS(qn_codebook, values, 12);
OFFSET_IS(qn_codebook, decision_points, 76);
OFFSET_IS(qn_codebook, code_of_rank, 136);
OFFSET_IS(qn_codebook, zero_code, 152);
OFFSET_IS(qn_weight_sizes, num_groups, 24);
OFFSET_IS(qn_weight, packed, 8);
OFFSET_IS(qn_weight, offset, 40);
OFFSET_IS(qn_weight, rows, 48);
OFFSET_IS(qn_weight, custom_values, 72);
OFFSET_IS(qn_weight, quant_type, 80);
OFFSET_IS(qn_weight, device_index, 88);
OFFSET_IS(qn_quantize_args, pinned_offset, 24);
OFFSET_IS(qn_quantize_args, dtype, 32);
OFFSET_IS(qn_dequantize_args, dtype, 24);
OFFSET_IS(qn_matmul_args, weight, 32);
OFFSET_IS(qn_matmul_args, dtype, 64);
OFFSET_IS(qn_matmul_transposed_args, weight, 32);
OFFSET_IS(qn_matmul_transposed_args, dtype, 56);
OFFSET_IS(qn_matmul_plan, prefers_dense, 16);
OFFSET_IS(qn_device_info, name, 24);
OFFSET_IS(qn_device_info, features, 280);
OFFSET_IS(qn_kernel_info, name, 24);
OFFSET_IS(qn_kernel_info, why_not, 88);
_Static_assert(sizeof(qn_build_info) == 40 && sizeof(qn_codebook) == 160, "size");
_Static_assert(sizeof(qn_weight_sizes) == 32 && sizeof(qn_weight) == 96, "size");
_Static_assert(sizeof(qn_quantize_args) == 40 && sizeof(qn_dequantize_args) == 32, "size");
_Static_assert(sizeof(qn_matmul_args) == 72 && sizeof(qn_matmul_transposed_args) == 64, "size");
_Static_assert(sizeof(qn_matmul_plan) == 24 && sizeof(qn_device_info) == 792, "size");
_Static_assert(sizeof(qn_kernel_info) == 600, "size");

/* A problem that every operation takes. The structs are copied from here. */
static problem p;
static float x[64], y[4], dx[64];
static int64_t bytes;
static char name[QN_KERNEL_NAME_BYTES];
static void* workspace;
enum { WORKSPACE_BYTES = 4096 };
static qn_quantize_args quantize_call;
static qn_dequantize_args dequantize_call;
static qn_matmul_args matmul_call;
static qn_matmul_transposed_args transposed_call;

static void set_up(void) {
  p = make_problem(4, 64, 64, QN_NF4, false);
  memset(y, UNTOUCHED, sizeof(y));
  memset(dx, UNTOUCHED, sizeof(dx));
  bytes = 77;
  memset(name, UNTOUCHED, sizeof(name));
  workspace = workspace_memory(WORKSPACE_BYTES);
  quantize_call = quantize_args(&p);
  dequantize_call = dequantize_args(&p);
  matmul_call = (qn_matmul_args){.struct_size = sizeof(qn_matmul_args),
                                 .x = x,
                                 .m = 1,
                                 .x_row_stride = 64,
                                 .weight = &p.weight,
                                 .y = y,
                                 .y_row_stride = 4};
  transposed_call = (qn_matmul_transposed_args){.struct_size = sizeof(qn_matmul_transposed_args),
                                                .dy = x,
                                                .m = 1,
                                                .dy_row_stride = 4,
                                                .weight = &p.weight,
                                                .dx = dx,
                                                .dx_row_stride = 64};
}

static void tear_down(void) {
  free(workspace);
  free_problem(&p);
}

static bool outputs_are_untouched(void) {
  return weight_is_untouched(&p) && is_filled(p.decoded, UNTOUCHED, (size_t)p.numel * 4) &&
         is_filled(y, UNTOUCHED, sizeof(y)) && is_filled(dx, UNTOUCHED, sizeof(dx)) &&
         is_filled(name, UNTOUCHED, sizeof(name)) && bytes == 77;
}

static const struct_fixture fixture = {set_up, tear_down, outputs_are_untouched};

/* ---- One call per function and struct ---- */

static qn_status build(void* s) { return qn_describe_build(s); }
static qn_status codebook(void* s) { return qn_describe_codebook(QN_NF4, NULL, s); }
static qn_status sizes(void* s) { return qn_describe_weight(4, 64, 64, s); }
static qn_status device(void* s) { return qn_describe_device(0, s); }
static qn_status kernel(void* s) { return qn_describe_kernel(0, s); }
static qn_status plan(void* s) { return qn_matmul_4bit_plan(&matmul_call, s); }
static qn_status plan_transposed(void* s) {
  return qn_matmul_4bit_transposed_plan(&transposed_call, s);
}

static qn_status quantize_run(void* s) {
  return qn_quantize_4bit(s, workspace, WORKSPACE_BYTES, NULL);
}
static qn_status quantize_bytes(void* s) { return qn_quantize_4bit_workspace_bytes(s, &bytes); }
static qn_status quantize_name(void* s) {
  return qn_quantize_4bit_selected_kernel(s, name, sizeof(name));
}
static qn_status dequantize_run(void* s) { return qn_dequantize_4bit(s, NULL); }
static qn_status dequantize_name(void* s) {
  return qn_dequantize_4bit_selected_kernel(s, name, sizeof(name));
}
static qn_status matmul_run(void* s) { return qn_matmul_4bit(s, workspace, WORKSPACE_BYTES, NULL); }
static qn_status matmul_bytes(void* s) { return qn_matmul_4bit_workspace_bytes(s, &bytes); }
static qn_status matmul_plan(void* s) {
  qn_matmul_plan answer = {.struct_size = sizeof(answer), .workspace_bytes = -7};
  const qn_status status = qn_matmul_4bit_plan(s, &answer);
  CHECK((status == QN_OK) == (answer.workspace_bytes != -7));
  return status;
}
static qn_status matmul_name(void* s) {
  return qn_matmul_4bit_selected_kernel(s, name, sizeof(name));
}
static qn_status transposed_run(void* s) {
  return qn_matmul_4bit_transposed(s, workspace, WORKSPACE_BYTES, NULL);
}
static qn_status transposed_bytes(void* s) {
  return qn_matmul_4bit_transposed_workspace_bytes(s, &bytes);
}
static qn_status transposed_plan(void* s) {
  qn_matmul_plan answer = {.struct_size = sizeof(answer), .workspace_bytes = -7};
  const qn_status status = qn_matmul_4bit_transposed_plan(s, &answer);
  CHECK((status == QN_OK) == (answer.workspace_bytes != -7));
  return status;
}
static qn_status transposed_name(void* s) {
  return qn_matmul_4bit_transposed_selected_kernel(s, name, sizeof(name));
}

static qn_status quantize_weight(void* s) {
  qn_quantize_args args = quantize_call;
  args.output = s;
  return quantize_run(&args);
}
static qn_status dequantize_weight(void* s) {
  qn_dequantize_args args = dequantize_call;
  args.weight = s;
  return dequantize_run(&args);
}
static qn_status matmul_weight(void* s) {
  qn_matmul_args args = matmul_call;
  args.weight = s;
  return matmul_run(&args);
}
static qn_status transposed_weight(void* s) {
  qn_matmul_transposed_args args = transposed_call;
  args.weight = s;
  return transposed_run(&args);
}

/* Of structs that the library reads, `valid` is one that set_up renews. */
#define TEST_INPUT(call, valid) test_struct(&fixture, call, &(valid), sizeof(valid))

void test_bad_structs(void) {
  test_output_struct(&fixture, build, sizeof(qn_build_info));
  test_output_struct(&fixture, codebook, sizeof(qn_codebook));
  test_output_struct(&fixture, sizes, sizeof(qn_weight_sizes));
  test_output_struct(&fixture, device, sizeof(qn_device_info));
  test_output_struct(&fixture, kernel, sizeof(qn_kernel_info));
  test_output_struct(&fixture, plan, sizeof(qn_matmul_plan));
  test_output_struct(&fixture, plan_transposed, sizeof(qn_matmul_plan));
  TEST_INPUT(quantize_run, quantize_call);
  TEST_INPUT(quantize_bytes, quantize_call);
  TEST_INPUT(quantize_name, quantize_call);
  TEST_INPUT(dequantize_run, dequantize_call);
  TEST_INPUT(dequantize_name, dequantize_call);
  TEST_INPUT(matmul_run, matmul_call);
  TEST_INPUT(matmul_bytes, matmul_call);
  TEST_INPUT(matmul_plan, matmul_call);
  TEST_INPUT(matmul_name, matmul_call);
  TEST_INPUT(transposed_run, transposed_call);
  TEST_INPUT(transposed_bytes, transposed_call);
  TEST_INPUT(transposed_plan, transposed_call);
  TEST_INPUT(transposed_name, transposed_call);
  TEST_INPUT(quantize_weight, p.weight);
  TEST_INPUT(dequantize_weight, p.weight);
  TEST_INPUT(matmul_weight, p.weight);
  TEST_INPUT(transposed_weight, p.weight);
}
