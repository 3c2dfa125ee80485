/* Wrong values, in every function: a status, a message with the values, and nothing touched. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "problem.h"

static const float one = 1.0f;

/* An address that is no multiple of anything. */
static void* odd(const void* data) { return (char*)(uintptr_t)data + 1; }

/* Every function that takes these arguments refuses them. */

static void refuse_quantize(const qn_quantize_args* args, const problem* p, const char* words) {
  int64_t bytes = 77;
  char name[QN_KERNEL_NAME_BYTES] = "";
  CHECK_REFUSED(qn_quantize_4bit(args, NULL, 0, NULL), words);
  CHECK_REFUSED(qn_quantize_4bit_workspace_bytes(args, &bytes), words);
  CHECK_REFUSED(qn_quantize_4bit_selected_kernel(args, name, sizeof(name)), words);
  CHECK(bytes == 77 && name[0] == '\0' && weight_is_untouched(p));
}

static void refuse_dequantize(const qn_dequantize_args* args, const problem* p, const char* words) {
  char name[QN_KERNEL_NAME_BYTES] = "";
  CHECK_REFUSED(qn_dequantize_4bit(args, NULL), words);
  CHECK_REFUSED(qn_dequantize_4bit_selected_kernel(args, name, sizeof(name)), words);
  CHECK(name[0] == '\0' && is_filled(p->decoded, UNTOUCHED, (size_t)p->numel * 4));
}

static float y[2 * 4], dx[2 * 64], x[2 * 64];

static void refuse_matmul(const qn_matmul_args* args, const char* words) {
  int64_t bytes = 77;
  char name[QN_KERNEL_NAME_BYTES] = "";
  qn_matmul_plan plan = {.struct_size = sizeof(plan), .workspace_bytes = 77};
  CHECK_REFUSED(qn_matmul_4bit(args, NULL, 0, NULL), words);
  CHECK_REFUSED(qn_matmul_4bit_workspace_bytes(args, &bytes), words);
  CHECK_REFUSED(qn_matmul_4bit_plan(args, &plan), words);
  CHECK_REFUSED(qn_matmul_4bit_selected_kernel(args, name, sizeof(name)), words);
  CHECK(bytes == 77 && plan.workspace_bytes == 77 && name[0] == '\0');
  CHECK(is_filled(y, UNTOUCHED, sizeof(y)));
}

static void refuse_matmul_transposed(const qn_matmul_transposed_args* args, const char* words) {
  int64_t bytes = 77;
  char name[QN_KERNEL_NAME_BYTES] = "";
  qn_matmul_plan plan = {.struct_size = sizeof(plan), .workspace_bytes = 77};
  CHECK_REFUSED(qn_matmul_4bit_transposed(args, NULL, 0, NULL), words);
  CHECK_REFUSED(qn_matmul_4bit_transposed_workspace_bytes(args, &bytes), words);
  CHECK_REFUSED(qn_matmul_4bit_transposed_plan(args, &plan), words);
  CHECK_REFUSED(qn_matmul_4bit_transposed_selected_kernel(args, name, sizeof(name)), words);
  CHECK(bytes == 77 && plan.workspace_bytes == 77 && name[0] == '\0');
  CHECK(is_filled(dx, UNTOUCHED, sizeof(dx)));
}

static qn_matmul_args matmul_args(const problem* p) {
  memset(y, UNTOUCHED, sizeof(y));
  return (qn_matmul_args){.struct_size = sizeof(qn_matmul_args),
                          .x = x,
                          .m = 2,
                          .x_row_stride = 64,
                          .weight = &p->weight,
                          .bias = x,
                          .y = y,
                          .y_row_stride = 4};
}

static qn_matmul_transposed_args transposed_args(const problem* p) {
  memset(dx, UNTOUCHED, sizeof(dx));
  return (qn_matmul_transposed_args){.struct_size = sizeof(qn_matmul_transposed_args),
                                     .dy = x,
                                     .m = 2,
                                     .dy_row_stride = 4,
                                     .weight = &p->weight,
                                     .dx = dx,
                                     .dx_row_stride = 64};
}

/* A wrong weight is refused by everything that takes one. */
static void refuse_weight(const problem* p, const qn_weight* weight, const char* words) {
  problem wrong = *p;
  wrong.weight = *weight;
  const qn_quantize_args quantize = quantize_args(&wrong);
  refuse_quantize(&quantize, p, words);
  const qn_dequantize_args dequantize = dequantize_args(&wrong);
  refuse_dequantize(&dequantize, p, words);
  const qn_matmul_args matmul = matmul_args(&wrong);
  refuse_matmul(&matmul, words);
  const qn_matmul_transposed_args transposed = transposed_args(&wrong);
  refuse_matmul_transposed(&transposed, words);
}

#define WITH(member, value, words)    \
  do {                                \
    qn_weight wrong = p.weight;       \
    wrong.member = (value);           \
    refuse_weight(&p, &wrong, words); \
  } while (0)

static void test_weight(void) {
  problem p = make_problem(4, 64, 64, QN_NF4, false);
  WITH(packed, NULL, "packed weight is null");
  WITH(absmax, NULL, "absmax is null");
  WITH(absmax, odd(p.weight.absmax), "absmax is not aligned to 4");
  WITH(absmax2, odd(p.weight.absmax), "absmax2 is not aligned to 4");
  WITH(offset, odd(p.weight.absmax), "offset is not aligned to 4");
  WITH(absmax2, p.weight.absmax, "absmax_codes is null");
  WITH(offset, p.weight.absmax, "absmax_codes is null");
  WITH(absmax_codes, p.weight.packed, "both");
  WITH(rows, -1, "-1 x 64");
  WITH(cols, INT64_MIN, "4 x -9223372036854775808");
  WITH(rows, INT64_MAX, "overflow");
  WITH(rows, INT64_C(1) << 55, "overflow");
  WITH(block_size, 0, "block_size 0");
  WITH(block_size, 63, "block_size 63");
  WITH(block_size, 8192, "block_size 8192");
  WITH(quant_type, 4, "quant_type 4");
  WITH(quant_type, -1, "quant_type -1");
  WITH(quant_type, QN_CUSTOM, "custom_values is null");
  WITH(custom_values, custom_values, "custom_values are given");
  WITH(device_type, 2, "device_type 2");
  WITH(device_type, -1, "device_type -1");
  WITH(device_index, 1, "no device 1 of type cpu");
  WITH(device_index, -1, "no device -1");
  WITH(reserved, 1, "reserved of");
  free_problem(&p);

  p = make_problem(4, 64, 64, QN_NF4, true);
  WITH(absmax2, NULL, "absmax2 is null");
  WITH(offset, NULL, "offset of the double quantization is null");
  free_problem(&p);

  p = make_problem(4, 64, 64, QN_CUSTOM, false);
  float values[16];
  memcpy(values, custom_values, sizeof(values));
  values[3] = NAN;
  WITH(custom_values, values, "codebook value 3");
  values[3] = values[2];
  WITH(custom_values, values, "must ascend");
  WITH(custom_values, odd(custom_values), "custom_values is not aligned");
  free_problem(&p);

  /* No CUDA device has this number, with CUDA or without. */
  p = make_problem(4, 64, 64, QN_NF4, false);
  p.weight.device_type = QN_CUDA;
  p.weight.device_index = 4000;
  const qn_dequantize_args args = dequantize_args(&p);
  CHECK_FAILS(qn_dequantize_4bit(&args, NULL), QN_UNSUPPORTED, "cuda:4000");
  CHECK(is_filled(p.decoded, UNTOUCHED, (size_t)p.numel * 4));
  free_problem(&p);
}
#undef WITH

#define WITH(op, valid, member, value, ...) \
  do {                                      \
    qn_##op##_args wrong = (valid);         \
    wrong.member = (value);                 \
    refuse_##op(&wrong, __VA_ARGS__);       \
  } while (0)

static void test_operations_arguments(void) {
  problem p = make_problem(4, 64, 64, QN_NF4, false);
  problem nested = make_problem(4, 64, 64, QN_NF4, true);
  const int64_t huge = INT64_C(1) << 61;

  const qn_quantize_args quantize = quantize_args(&p);
  WITH(quantize, quantize, input, NULL, &p, "input is null");
  WITH(quantize, quantize, input, odd(p.input), &p, "input is not aligned to 4");
  WITH(quantize, quantize, output, NULL, &p, "output is null");
  WITH(quantize, quantize, pinned_offset, &one, &p, "double quantization is off");
  WITH(quantize, quantize_args(&nested), pinned_offset, odd(&one), &nested, "pinned_offset");
  WITH(quantize, quantize, dtype, 3, &p, "dtype 3");
  WITH(quantize, quantize, dtype, -1, &p, "dtype -1");
  WITH(quantize, quantize, reserved, 1, &p, "reserved of args is 1");

  const qn_dequantize_args dequantize = dequantize_args(&p);
  WITH(dequantize, dequantize, output, NULL, &p, "output is null");
  WITH(dequantize, dequantize, output, odd(p.decoded), &p, "output is not aligned to 4");
  WITH(dequantize, dequantize, weight, NULL, &p, "weight is null");
  WITH(dequantize, dequantize, dtype, 3, &p, "dtype 3");
  WITH(dequantize, dequantize, reserved, -1, &p, "reserved of args is -1");

  const qn_matmul_args matmul = matmul_args(&p);
  WITH(matmul, matmul, x, NULL, "x is null");
  WITH(matmul, matmul, x, odd(x), "x is not aligned to 4");
  WITH(matmul, matmul, y, NULL, "y is null");
  WITH(matmul, matmul, y, odd(y), "y is not aligned to 4");
  WITH(matmul, matmul, bias, odd(x), "bias is not aligned to 4");
  WITH(matmul, matmul, weight, NULL, "weight is null");
  WITH(matmul, matmul, m, -1, "-1 x 64");
  WITH(matmul, matmul, m, INT64_MAX, "overflow");
  WITH(matmul, matmul, x_row_stride, 63, "row stride 63");
  WITH(matmul, matmul, x_row_stride, huge, "overflow");
  WITH(matmul, matmul, y_row_stride, -4, "row stride -4");
  WITH(matmul, matmul, y_row_stride, huge, "overflow");
  WITH(matmul, matmul, dtype, 9, "dtype 9");
  WITH(matmul, matmul, reserved, 1, "reserved of args is 1");

  const qn_matmul_transposed_args transposed = transposed_args(&p);
  WITH(matmul_transposed, transposed, dy, NULL, "dy is null");
  WITH(matmul_transposed, transposed, dy, odd(x), "dy is not aligned to 4");
  WITH(matmul_transposed, transposed, dx, NULL, "dx is null");
  WITH(matmul_transposed, transposed, dx, odd(dx), "dx is not aligned to 4");
  WITH(matmul_transposed, transposed, weight, NULL, "weight is null");
  WITH(matmul_transposed, transposed, m, -5, "-5 x 4");
  WITH(matmul_transposed, transposed, m, INT64_MAX, "overflow");
  WITH(matmul_transposed, transposed, dy_row_stride, 3, "row stride 3");
  WITH(matmul_transposed, transposed, dx_row_stride, huge, "overflow");
  WITH(matmul_transposed, transposed, dtype, 9, "dtype 9");
  WITH(matmul_transposed, transposed, reserved, 1, "reserved of args is 1");
  free_problem(&p);
  free_problem(&nested);
}

static void test_workspaces(void) {
  problem p = make_problem(4, 64, 64, QN_NF4, true);
  const qn_quantize_args quantize = quantize_args(&p);
  const qn_matmul_args matmul = matmul_args(&p);
  const qn_matmul_transposed_args transposed = transposed_args(&p);
  int64_t needed = 0;
  CHECK_OK(qn_quantize_4bit_workspace_bytes(&quantize, &needed));
  CHECK(needed > 0);
  char* workspace = workspace_memory(needed + 8);
  CHECK_REFUSED(qn_quantize_4bit(&quantize, workspace, needed - 1, NULL), "needs");
  CHECK_REFUSED(qn_quantize_4bit(&quantize, NULL, 0, NULL), "needs");
  static const struct {
    int64_t shift, bytes;
    const char* words;
  } wrong[] = {{0, -1, "-1 bytes"}, {8, 64, "not aligned to 256"}};
  for (int i = 0; i < 2; ++i) {
    char* at = workspace + wrong[i].shift;
    CHECK_REFUSED(qn_quantize_4bit(&quantize, at, wrong[i].bytes, NULL), wrong[i].words);
    CHECK_REFUSED(qn_matmul_4bit(&matmul, at, wrong[i].bytes, NULL), wrong[i].words);
    CHECK_REFUSED(qn_matmul_4bit_transposed(&transposed, at, wrong[i].bytes, NULL), wrong[i].words);
  }
  CHECK_REFUSED(qn_quantize_4bit(&quantize, NULL, needed, NULL), "null address");
  CHECK_REFUSED(qn_matmul_4bit(&matmul, NULL, 4096, NULL), "null address");
  CHECK_REFUSED(qn_matmul_4bit_transposed(&transposed, NULL, 4096, NULL), "null address");
  CHECK(weight_is_untouched(&p));
  CHECK(is_filled(y, UNTOUCHED, sizeof(y)) && is_filled(dx, UNTOUCHED, sizeof(dx)));
  CHECK_REFUSED(qn_quantize_4bit_workspace_bytes(&quantize, NULL), "workspace_bytes is null");
  CHECK_REFUSED(qn_matmul_4bit_workspace_bytes(&matmul, NULL), "workspace_bytes is null");
  CHECK_REFUSED(qn_matmul_4bit_transposed_workspace_bytes(&transposed, odd(workspace)),
                "workspace_bytes is not aligned");
  free(workspace);

  char name[4] = "abc";
  CHECK_REFUSED(qn_quantize_4bit_selected_kernel(&quantize, NULL, 64), "name is null");
  CHECK_REFUSED(qn_quantize_4bit_selected_kernel(&quantize, name, 0), "name has 0 bytes");
  CHECK_REFUSED(qn_quantize_4bit_selected_kernel(&quantize, name, 4), "do not fit into 4");
  const qn_dequantize_args dequantize = dequantize_args(&p);
  CHECK_REFUSED(qn_dequantize_4bit_selected_kernel(&dequantize, NULL, 64), "name is null");
  CHECK_REFUSED(qn_matmul_4bit_selected_kernel(&matmul, name, -1), "name has -1 bytes");
  CHECK_REFUSED(qn_matmul_4bit_transposed_selected_kernel(&transposed, name, 1), "do not fit");
  CHECK(strcmp(name, "abc") == 0);
  free_problem(&p);
}

static void test_queries_arguments(void) {
  CHECK_REFUSED(qn_describe_build(NULL), "info is null");
  qn_codebook book = {.struct_size = sizeof(book), .zero_code = 99};
  CHECK_REFUSED(qn_describe_codebook(17, NULL, &book), "quant_type 17");
  CHECK_REFUSED(qn_describe_codebook(QN_NF4, custom_values, &book), "custom_values are given");
  CHECK_REFUSED(qn_describe_codebook(QN_CUSTOM, NULL, &book), "custom_values is null");
  float values[16] = {0};
  CHECK_REFUSED(qn_describe_codebook(QN_CUSTOM, values, &book), "must ascend");
  CHECK(book.zero_code == 99);
  CHECK_REFUSED(qn_signed_dynamic_map(NULL), "values is null");
  CHECK_REFUSED(qn_unsigned_dynamic_map(NULL), "values is null");
  CHECK_REFUSED(qn_signed_dynamic_map(odd(values)), "values is not aligned");

  qn_weight_sizes sizes = {.struct_size = sizeof(sizes), .num_blocks = 99};
  CHECK_REFUSED(qn_describe_weight(-1, 1, 64, &sizes), "-1 x 1");
  CHECK_REFUSED(qn_describe_weight(INT64_MAX, 2, 64, &sizes), "overflow");
  CHECK_REFUSED(qn_describe_weight(1, 1, 100, &sizes), "block_size 100");
  CHECK(sizes.num_blocks == 99);

  int64_t count = 99;
  CHECK_REFUSED(qn_device_count(NULL), "count is null");
  CHECK_REFUSED(qn_device_count(odd(&count)), "count is not aligned");
  CHECK_REFUSED(qn_kernel_count(NULL), "count is null");
  CHECK_REFUSED(qn_kernel_count(odd(&count)), "count is not aligned");
  CHECK(count == 99);
  const int64_t beyond[] = {-1, 1000, INT64_MIN, INT64_MAX};
  qn_device_info device = {.struct_size = sizeof(device), .memory_bytes = 99};
  qn_kernel_info kernel = {.struct_size = sizeof(kernel), .op = 99};
  for (int i = 0; i < 4; ++i) {
    CHECK_REFUSED(qn_describe_device(beyond[i], &device), "there is no device");
    CHECK_REFUSED(qn_describe_kernel(beyond[i], &kernel), "there is no kernel");
  }
  CHECK(device.memory_bytes == 99 && kernel.op == 99);

  char text[8] = "abc";
  CHECK_REFUSED(qn_cuda_unavailable_reason(NULL, 8), "text is null");
  CHECK_REFUSED(qn_cuda_unavailable_reason(text, 0), "text has 0 bytes");
  CHECK_REFUSED(qn_forced_kernel(QN_MATMUL_4BIT, QN_CPU, NULL, 8), "name is null");
  CHECK_REFUSED(qn_forced_kernel(-1, QN_CPU, text, 8), "operation -1");
  CHECK_REFUSED(qn_forced_kernel(QN_MATMUL_4BIT, 2, text, 8), "device_type 2");
  CHECK_REFUSED(qn_last_kernel(QN_MATMUL_4BIT, NULL, 8), "name is null");
  CHECK_REFUSED(qn_last_kernel(QN_MATMUL_4BIT, text, -8), "name has -8 bytes");
  CHECK_REFUSED(qn_last_kernel(11, text, 8), "operation 11");
  CHECK(strcmp(text, "abc") == 0);
  CHECK_REFUSED(qn_force_kernel(11, QN_CPU, "scalar"), "operation 11");
  CHECK_REFUSED(qn_force_kernel(QN_MATMUL_4BIT, -1, "scalar"), "device_type -1");
  CHECK_REFUSED(qn_force_kernel(QN_MATMUL_4BIT, QN_CPU, NULL), "name is null");
  CHECK_REFUSED(qn_force_kernel(QN_MATMUL_4BIT, QN_CPU, ""), "name is empty");
  CHECK_REFUSED(qn_force_kernel(QN_MATMUL_4BIT, QN_CPU, "fastest"), "scalar");
  CHECK_REFUSED(qn_unforce_kernel(-2, QN_CPU), "operation -2");
  CHECK_REFUSED(qn_unforce_kernel(QN_MATMUL_4BIT, 5), "device_type 5");
  CHECK_OK(qn_forced_kernel(QN_MATMUL_4BIT, QN_CPU, text, 8));
  CHECK(strcmp(text, "") == 0);

  int32_t threads[2] = {99, 99}, before = 0;
  CHECK_REFUSED(qn_cpu_threads(NULL), "threads is null");
  CHECK_REFUSED(qn_cpu_threads(odd(threads)), "threads is not aligned");
  CHECK(threads[0] == 99);
  CHECK_OK(qn_cpu_threads(&before));
  CHECK_REFUSED(qn_set_cpu_threads(0), "0 threads");
  CHECK_REFUSED(qn_set_cpu_threads(INT32_MIN), "-2147483648 threads");
  CHECK_OK(qn_cpu_threads(threads));
  CHECK(threads[0] == before);
}

void test_bad_arguments(void) {
  test_weight();
  test_operations_arguments();
  test_workspaces();
  test_queries_arguments();
}
