/* Listing, forcing and asking for kernels. */
#include <string.h>

#include "check.h"
#include "problem.h"

/* Of a 4-bit weight; those of optimizers follow. */
enum { NUM_WEIGHT_OPS = 4, NUM_OPS = QN_GROUPED_MATMUL_4BIT_TRANSPOSED + 1 };

/* The name that the operation says it would run, for a small problem on the CPU. */
static void selected(qn_op op, char* name) {
  problem p = make_problem(4, 64, 64, QN_NF4, false);
  float x[64] = {0}, y[64] = {0};
  const qn_quantize_args quantize = quantize_args(&p);
  const qn_dequantize_args dequantize = dequantize_args(&p);
  const qn_matmul_args matmul = {.struct_size = sizeof(matmul),
                                 .x = x,
                                 .m = 1,
                                 .x_row_stride = 64,
                                 .weight = &p.weight,
                                 .y = y,
                                 .y_row_stride = 4};
  const qn_matmul_transposed_args transposed = {.struct_size = sizeof(transposed),
                                                .dy = y,
                                                .m = 1,
                                                .dy_row_stride = 4,
                                                .weight = &p.weight,
                                                .dx = x,
                                                .dx_row_stride = 64};
  if (op == QN_QUANTIZE_4BIT) {
    CHECK_OK(qn_quantize_4bit_selected_kernel(&quantize, name, QN_KERNEL_NAME_BYTES));
  } else if (op == QN_DEQUANTIZE_4BIT) {
    CHECK_OK(qn_dequantize_4bit_selected_kernel(&dequantize, name, QN_KERNEL_NAME_BYTES));
  } else if (op == QN_MATMUL_4BIT) {
    CHECK_OK(qn_matmul_4bit_selected_kernel(&matmul, name, QN_KERNEL_NAME_BYTES));
  } else {
    CHECK_OK(qn_matmul_4bit_transposed_selected_kernel(&transposed, name, QN_KERNEL_NAME_BYTES));
  }
  CHECK(weight_is_untouched(&p));
  free_problem(&p);
}

static void test_one_kernel(const qn_kernel_info* kernel) {
  char name[QN_KERNEL_NAME_BYTES];
  CHECK(strlen(kernel->name) > 0);
  CHECK((strlen(kernel->why_not) == 0) == (kernel->usable == 1));
  CHECK_OK(qn_force_kernel(kernel->op, kernel->device_type, kernel->name));
  CHECK_OK(qn_forced_kernel(kernel->op, kernel->device_type, name, sizeof(name)));
  CHECK(strcmp(name, kernel->name) == 0);
  if (kernel->op == QN_DEQUANTIZE_4BIT && kernel->device_type == QN_CPU) {
    problem p = make_problem(2, 64, 64, QN_NF4, false);
    memset(p.weight.packed, 0x77, (size_t)p.sizes.packed_bytes);
    p.weight.absmax[0] = p.weight.absmax[1] = 1.0f;
    const qn_dequantize_args args = dequantize_args(&p);
    if (kernel->usable) {
      CHECK_OK(qn_dequantize_4bit(&args, NULL));
      CHECK_OK(qn_last_kernel(QN_DEQUANTIZE_4BIT, name, sizeof(name)));
      CHECK(strcmp(name, kernel->name) == 0);
    } else {
      CHECK_FAILS(qn_dequantize_4bit(&args, NULL), QN_UNSUPPORTED, kernel->name);
      CHECK(is_filled(p.decoded, UNTOUCHED, (size_t)p.numel * 4));
    }
    free_problem(&p);
  }
  CHECK_OK(qn_unforce_kernel(kernel->op, kernel->device_type));
  CHECK_OK(qn_forced_kernel(kernel->op, kernel->device_type, name, sizeof(name)));
  CHECK(strcmp(name, "") == 0);
}

void test_kernels(void) {
  int64_t count = 0;
  CHECK_OK(qn_kernel_count(&count));
  int scalar_kernels = 0;
  for (int64_t i = 0; i < count; ++i) {
    qn_kernel_info kernel = {.struct_size = sizeof(kernel)};
    CHECK_OK(qn_describe_kernel(i, &kernel));
    CHECK(kernel.op >= 0 && kernel.op < NUM_OPS);
    test_one_kernel(&kernel);
    if (kernel.device_type == QN_CPU && strcmp(kernel.name, "scalar") == 0) ++scalar_kernels;
  }
  CHECK(scalar_kernels == NUM_OPS);
  for (qn_op op = 0; op < NUM_WEIGHT_OPS; ++op) {
    char name[QN_KERNEL_NAME_BYTES] = "";
    CHECK_OK(qn_force_kernel(op, QN_CPU, "scalar"));
    selected(op, name);
    CHECK(strcmp(name, "scalar") == 0);
    CHECK_OK(qn_unforce_kernel(op, QN_CPU));
    selected(op, name);
    CHECK(strlen(name) > 0);
  }
}
