/* Products of groups: against plain C loops; wrong values and structs; the layout of the structs. */
#include "qlora_native/c_api_grouped.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "problem.h"

/* 64-bit platforms. A struct may grow at its end; nothing else here may change. */
#define OFFSET_IS(type, member, bytes) \
  _Static_assert(offsetof(type, member) == (bytes), #type "." #member " has moved")
OFFSET_IS(qn_weight_stack, count, 16);
OFFSET_IS(qn_weight_stack, offset_stride, 48);
OFFSET_IS(qn_grouped_matmul_args, group_ends, 32);
OFFSET_IS(qn_grouped_matmul_args, bias, 48);
OFFSET_IS(qn_grouped_matmul_args, dtype, 80);
OFFSET_IS(qn_grouped_matmul_args, index_type, 84);
OFFSET_IS(qn_grouped_matmul_transposed_args, weights, 40);
OFFSET_IS(qn_grouped_matmul_transposed_args, index_type, 68);
_Static_assert(sizeof(qn_weight_stack) == 56 && sizeof(qn_grouped_matmul_args) == 88, "size");
_Static_assert(sizeof(qn_grouped_matmul_transposed_args) == 72, "size");

enum { COUNT = 3, ROWS = 6, COLS = 64, M = 7 };

/* COUNT matrices [ROWS, COLS] in arrays of one stack, and groups of 2, 0 and 4 rows of 7. */
static problem parts[COUNT];
static uint8_t packed[COUNT][ROWS * COLS / 2];
static float absmax[COUNT][ROWS];
static uint8_t codes[COUNT][ROWS];
static float constants[COUNT][2]; /* absmax2, offset */
static qn_weight first;
static qn_weight_stack stack;
static int32_t ends[COUNT];
static int64_t wide_ends[COUNT];
static float x[M * COLS], y[M * ROWS], dx[M * COLS], bias[COUNT * ROWS];
static qn_grouped_matmul_args forward;
static qn_grouped_matmul_transposed_args backward;
static int64_t bytes;
static char name[QN_KERNEL_NAME_BYTES];
static void* workspace;
enum { WORKSPACE_BYTES = 65536 };

static void set_up_with(bool double_quant) {
  uint32_t state = 5;
  for (int e = 0; e < COUNT; ++e) {
    parts[e] = make_problem(ROWS, COLS, 64, QN_NF4, double_quant);
    for (int i = 0; i < ROWS * COLS; ++i) parts[e].input[i] = number(&state);
    quantize(&parts[e]);
    dequantize(&parts[e]);
    const qn_weight* w = &parts[e].weight;
    memcpy(packed[e], w->packed, sizeof(packed[e]));
    if (double_quant) {
      memcpy(codes[e], w->absmax_codes, sizeof(codes[e]));
      constants[e][0] = w->absmax2[0];
      constants[e][1] = w->offset[0];
    } else {
      memcpy(absmax[e], w->absmax, sizeof(absmax[e]));
    }
  }
  first = parts[0].weight;
  first.packed = packed[0];
  first.absmax = double_quant ? NULL : absmax[0];
  first.absmax_codes = double_quant ? codes[0] : NULL;
  first.absmax2 = double_quant ? &constants[0][0] : NULL;
  first.offset = double_quant ? &constants[0][1] : NULL;
  stack = (qn_weight_stack){.struct_size = sizeof(stack),
                            .first = &first,
                            .count = COUNT,
                            .packed_stride = sizeof(packed[0]),
                            .absmax_stride = ROWS,
                            .absmax2_stride = 2,
                            .offset_stride = 2};
  const int32_t groups[COUNT] = {2, 2, 6};
  for (int e = 0; e < COUNT; ++e) wide_ends[e] = ends[e] = groups[e];
  for (int i = 0; i < M * COLS; ++i) x[i] = number(&state);
  for (int i = 0; i < COUNT * ROWS; ++i) bias[i] = number(&state);
  memset(y, UNTOUCHED, sizeof(y));
  memset(dx, UNTOUCHED, sizeof(dx));
  bytes = 77;
  memset(name, UNTOUCHED, sizeof(name));
  workspace = workspace_memory(WORKSPACE_BYTES);
  forward = (qn_grouped_matmul_args){.struct_size = sizeof(forward),
                                     .x = x,
                                     .m = M,
                                     .x_row_stride = COLS,
                                     .group_ends = ends,
                                     .weights = &stack,
                                     .bias = bias,
                                     .bias_row_stride = ROWS,
                                     .y = y,
                                     .y_row_stride = ROWS,
                                     .index_type = QN_INT32};
  backward = (qn_grouped_matmul_transposed_args){.struct_size = sizeof(backward),
                                                 .dy = x,
                                                 .m = M,
                                                 .dy_row_stride = ROWS,
                                                 .group_ends = wide_ends,
                                                 .weights = &stack,
                                                 .dx = dx,
                                                 .dx_row_stride = COLS,
                                                 .index_type = QN_INT64};
}

static void set_up(void) { set_up_with(false); }

static void tear_down(void) {
  free(workspace);
  for (int e = 0; e < COUNT; ++e) free_problem(&parts[e]);
}

static bool outputs_are_untouched(void) {
  return is_filled(y, UNTOUCHED, sizeof(y)) && is_filled(dx, UNTOUCHED, sizeof(dx)) &&
         is_filled(name, UNTOUCHED, sizeof(name)) && bytes == 77;
}

static int group_of(int row) {
  return row < ends[0] ? 0 : row < ends[1] ? 1 : row < ends[2] ? 2 : -1;
}

static void test_products(bool double_quant) {
  set_up_with(double_quant);
  qn_matmul_plan plan = {.struct_size = sizeof(plan)};
  CHECK_OK(qn_grouped_matmul_4bit_workspace_bytes(&forward, &bytes));
  CHECK_OK(qn_grouped_matmul_4bit_plan(&forward, &plan));
  CHECK(bytes >= 0 && bytes <= WORKSPACE_BYTES && plan.workspace_bytes == bytes);
  CHECK_OK(qn_grouped_matmul_4bit_selected_kernel(&forward, name, sizeof(name)));
  CHECK_OK(qn_grouped_matmul_4bit(&forward, workspace, bytes, NULL));
  char last[QN_KERNEL_NAME_BYTES];
  CHECK_OK(qn_last_kernel(QN_GROUPED_MATMUL_4BIT, last, sizeof(last)));
  CHECK(strcmp(last, name) == 0);
  for (int i = 0; i < M; ++i) {
    const int e = group_of(i);
    for (int n = 0; n < ROWS; ++n) {
      double sum = e < 0 ? 0 : bias[e * ROWS + n], size = fabs(sum);
      for (int k = 0; e >= 0 && k < COLS; ++k) {
        const double term = (double)x[i * COLS + k] * parts[e].decoded[n * COLS + k];
        sum += term;
        size += fabs(term);
      }
      CHECK(fabs(y[i * ROWS + n] - sum) <= 1e-6 * size);
    }
  }
  CHECK_OK(qn_grouped_matmul_4bit_transposed_workspace_bytes(&backward, &bytes));
  CHECK_OK(qn_grouped_matmul_4bit_transposed_plan(&backward, &plan));
  CHECK(bytes >= 0 && bytes <= WORKSPACE_BYTES && plan.workspace_bytes == bytes);
  CHECK_OK(qn_grouped_matmul_4bit_transposed_selected_kernel(&backward, name, sizeof(name)));
  CHECK_OK(qn_grouped_matmul_4bit_transposed(&backward, workspace, bytes, NULL));
  for (int i = 0; i < M; ++i) {
    const int e = group_of(i);
    for (int k = 0; k < COLS; ++k) {
      double sum = 0, size = 0;
      for (int n = 0; e >= 0 && n < ROWS; ++n) {
        const double term = (double)x[i * ROWS + n] * parts[e].decoded[n * COLS + k];
        sum += term;
        size += fabs(term);
      }
      CHECK(fabs(dx[i * COLS + k] - sum) <= 1e-6 * size);
    }
  }
  tear_down();
}

/* Every function that takes these arguments refuses them. */

static void refuse_forward(const qn_grouped_matmul_args* args, const char* words) {
  qn_matmul_plan plan = {.struct_size = sizeof(plan), .workspace_bytes = 77};
  CHECK_REFUSED(qn_grouped_matmul_4bit(args, workspace, WORKSPACE_BYTES, NULL), words);
  CHECK_REFUSED(qn_grouped_matmul_4bit_workspace_bytes(args, &bytes), words);
  CHECK_REFUSED(qn_grouped_matmul_4bit_plan(args, &plan), words);
  CHECK_REFUSED(qn_grouped_matmul_4bit_selected_kernel(args, name, sizeof(name)), words);
  CHECK(plan.workspace_bytes == 77 && outputs_are_untouched());
}

static void refuse_backward(const qn_grouped_matmul_transposed_args* args, const char* words) {
  qn_matmul_plan plan = {.struct_size = sizeof(plan), .workspace_bytes = 77};
  CHECK_REFUSED(qn_grouped_matmul_4bit_transposed(args, workspace, WORKSPACE_BYTES, NULL), words);
  CHECK_REFUSED(qn_grouped_matmul_4bit_transposed_workspace_bytes(args, &bytes), words);
  CHECK_REFUSED(qn_grouped_matmul_4bit_transposed_plan(args, &plan), words);
  CHECK_REFUSED(qn_grouped_matmul_4bit_transposed_selected_kernel(args, name, sizeof(name)), words);
  CHECK(plan.workspace_bytes == 77 && outputs_are_untouched());
}

static void* odd(const void* data) { return (char*)(uintptr_t)data + 1; }

#define FORWARD(member, value, words)       \
  do {                                      \
    qn_grouped_matmul_args wrong = forward; \
    wrong.member = (value);                 \
    refuse_forward(&wrong, words);          \
  } while (0)

#define BACKWARD(member, value, words)                  \
  do {                                                  \
    qn_grouped_matmul_transposed_args wrong = backward; \
    wrong.member = (value);                             \
    refuse_backward(&wrong, words);                     \
  } while (0)

/* What both directions take: a wrong stack and wrong ends. */
static void refuse_both(const char* words) {
  refuse_forward(&forward, words);
  refuse_backward(&backward, words);
}

#define STACK(member, value, words)       \
  do {                                    \
    const qn_weight_stack before = stack; \
    stack.member = (value);               \
    refuse_both(words);                   \
    stack = before;                       \
  } while (0)

#define FIRST(member, value, words) \
  do {                              \
    const qn_weight before = first; \
    first.member = (value);         \
    refuse_both(words);             \
    first = before;                 \
  } while (0)

static void test_wrong_values(void) {
  const int64_t huge = INT64_C(1) << 61;
  set_up();
  FORWARD(x, NULL, "x is null");
  FORWARD(x, odd(x), "x is not aligned to 4");
  FORWARD(y, NULL, "y is null");
  FORWARD(y, odd(y), "y is not aligned to 4");
  FORWARD(bias, odd(bias), "bias is not aligned to 4");
  FORWARD(bias_row_stride, ROWS - 1, "the bias has row stride 5");
  FORWARD(weights, NULL, "weights is null");
  FORWARD(group_ends, NULL, "ends of groups is null");
  FORWARD(group_ends, odd(ends), "group_ends is not aligned to 4");
  FORWARD(m, -1, "-1 x 64");
  FORWARD(m, INT64_MAX, "overflow");
  FORWARD(m, 5, "group 2 ends at row 6, after 2, of 5 rows");
  FORWARD(x_row_stride, 63, "row stride 63");
  FORWARD(y_row_stride, huge, "overflow");
  FORWARD(dtype, 9, "dtype 9");
  FORWARD(index_type, 2, "index_type 2");
  FORWARD(index_type, -1, "index_type -1");
  BACKWARD(dy, NULL, "dy is null");
  BACKWARD(dy, odd(x), "dy is not aligned to 4");
  BACKWARD(dx, NULL, "dx is null");
  BACKWARD(dx, odd(dx), "dx is not aligned to 4");
  BACKWARD(weights, NULL, "weights is null");
  BACKWARD(group_ends, NULL, "ends of groups is null");
  BACKWARD(group_ends, odd(wide_ends), "group_ends is not aligned to 8");
  BACKWARD(m, -5, "-5 x 6");
  BACKWARD(dy_row_stride, 5, "row stride 5");
  BACKWARD(dx_row_stride, huge, "overflow");
  BACKWARD(dtype, -1, "dtype -1");
  BACKWARD(index_type, 7, "index_type 7");
  STACK(first, NULL, "first is null");
  STACK(count, -1, "there are -1 matrices");
  STACK(packed_stride, ROWS * COLS / 2 - 1, "stride 191, less than the 192");
  STACK(packed_stride, huge, "overflow");
  STACK(packed_stride, -192, "stride -192");
  STACK(absmax_stride, ROWS - 1, "absmax has stride 5");
  FIRST(packed, NULL, "packed weight is null");
  FIRST(absmax, NULL, "absmax is null");
  FIRST(rows, -1, "-1 x 64");
  FIRST(block_size, 63, "block_size 63");
  FIRST(reserved, 1, "reserved of first");
  ends[1] = 1;
  wide_ends[1] = 1;
  refuse_both("group 1 ends at row 1, after 2, of 7 rows");
  tear_down();

  set_up_with(true);
  STACK(absmax2_stride, 0, "absmax2 has stride 0");
  STACK(offset_stride, 0, "the offset has stride 0");
  FIRST(absmax2, NULL, "absmax2 is null");
  CHECK_REFUSED(qn_grouped_matmul_4bit(&forward, NULL, -1, NULL), "-1 bytes");
  CHECK_REFUSED(qn_grouped_matmul_4bit_transposed(&backward, NULL, 64, NULL), "null address");
  CHECK_REFUSED(qn_grouped_matmul_4bit_workspace_bytes(&forward, NULL), "workspace_bytes is null");
  CHECK_REFUSED(qn_grouped_matmul_4bit_selected_kernel(&forward, name, 0), "name has 0 bytes");
  CHECK(outputs_are_untouched());
  tear_down();
}

/* ---- struct_size ---- */

static void refuse_sizes(void* args, void (*refused)(const char* words), size_t size) {
  const uint64_t wrong[] = {0, 8, size - 8, size - 1, 4097, UINT64_MAX};
  for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); ++i) {
    memcpy(args, &wrong[i], sizeof(wrong[i]));
    refused("struct_size");
  }
  const uint64_t right = size;
  memcpy(args, &right, sizeof(right));
}

static void refused_forward(const char* words) { refuse_forward(&forward, words); }
static void refused_backward(const char* words) { refuse_backward(&backward, words); }

static void test_structs(void) {
  set_up();
  refuse_forward(NULL, "args is null");
  refuse_backward(NULL, "args is null");
  refuse_sizes(&forward, refused_forward, sizeof(forward));
  refuse_sizes(&backward, refused_backward, sizeof(backward));
  refuse_sizes(&stack, refuse_both, sizeof(stack));
  refuse_sizes(&first, refuse_both, sizeof(first));
  /* A later version's struct, of which the caller uses nothing that is new, and one with more. */
  struct {
    qn_grouped_matmul_args args;
    int64_t more;
  } larger = {.args = forward, .more = 0};
  larger.args.struct_size = sizeof(larger);
  CHECK_OK(qn_grouped_matmul_4bit(&larger.args, workspace, WORKSPACE_BYTES, NULL));
  memset(y, UNTOUCHED, sizeof(y));
  larger.more = 1;
  refuse_forward(&larger.args, "not zero beyond");
  tear_down();
}

void test_grouped(void) {
  test_products(false);
  test_products(true);
  test_wrong_values();
  test_structs();
}
