/* What the operations compute, against plain C loops. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "problem.h"

static qn_codebook codebook_of(const problem* p) {
  qn_codebook book = {.struct_size = sizeof(book)};
  CHECK_OK(qn_describe_codebook(p->quant_type, p->weight.custom_values, &book));
  return book;
}

static uint8_t code_of(const qn_codebook* book, float x) {
  int rank = 0;
  for (int i = 0; i < 15; ++i) rank += x > book->decision_points[i];
  return book->code_of_rank[rank];
}

/* packed and absmax as the format defines them. */
static void plain_quantize(const problem* p, uint8_t* packed, float* absmax) {
  const qn_codebook book = codebook_of(p);
  for (int64_t b = 0; b < p->sizes.num_blocks; ++b) {
    absmax[b] = 0.0f;
    for (int64_t e = b * p->block_size; e < (b + 1) * p->block_size && e < p->numel; ++e) {
      absmax[b] = fmaxf(absmax[b], fabsf(p->input[e]));
    }
  }
  for (int64_t i = 0; i < p->sizes.packed_bytes; ++i) {
    uint8_t codes[2] = {book.zero_code, book.zero_code};
    for (int64_t e = 2 * i; e < 2 * i + 2 && e < p->numel; ++e) {
      const float scale = absmax[e / p->block_size];
      if (scale > 0.0f) codes[e % 2] = code_of(&book, p->input[e] * (1.0f / scale));
    }
    packed[i] = (uint8_t)(codes[0] << 4 | codes[1]);
  }
}

static float plain_scale(const problem* p, const float* map, int64_t block) {
  if (!p->double_quant) return p->weight.absmax[block];
  const float scaled = map[p->weight.absmax_codes[block]] * p->weight.absmax2[block / 256];
  return scaled + p->weight.offset[0];
}

static void plain_dequantize(const problem* p, float* decoded) {
  float map[256];
  CHECK_OK(qn_signed_dynamic_map(map));
  const qn_codebook book = codebook_of(p);
  for (int64_t e = 0; e < p->numel; ++e) {
    const uint8_t byte = p->weight.packed[e / 2];
    const int code = e % 2 == 0 ? byte >> 4 : byte & 15;
    decoded[e] = book.values[code] * plain_scale(p, map, e / p->block_size);
  }
}

static void check_double_quantization(const problem* p, const float* absmax) {
  float map[256];
  CHECK_OK(qn_signed_dynamic_map(map));
  double sum = 0;
  for (int64_t b = 0; b < p->sizes.num_blocks; ++b) sum += absmax[b];
  CHECK(fabs(p->weight.offset[0] - sum / (double)p->sizes.num_blocks) < 1e-6);
  for (int64_t g = 0; g < p->sizes.num_groups; ++g) {
    float absmax2 = 0.0f;
    for (int64_t b = g * 256; b < (g + 1) * 256 && b < p->sizes.num_blocks; ++b) {
      absmax2 = fmaxf(absmax2, fabsf(absmax[b] - p->weight.offset[0]));
    }
    CHECK(p->weight.absmax2[g] == absmax2);
    for (int64_t b = g * 256; b < (g + 1) * 256 && b < p->sizes.num_blocks; ++b) {
      const double x = absmax2 > 0 ? (absmax[b] - p->weight.offset[0]) * (1.0f / absmax2) : 0;
      int nearest = 0;
      for (int c = 1; c < 256; ++c) {
        if (fabs(map[c] - x) < fabs(map[nearest] - x)) nearest = c;
      }
      CHECK(p->weight.absmax_codes[b] == nearest);
    }
  }
}

static void test_quantize(problem p) {
  uint8_t* packed = filled_memory(p.sizes.packed_bytes);
  float* absmax = filled_memory(p.sizes.num_blocks * 4);
  float* decoded = filled_memory(p.numel * 4);
  plain_quantize(&p, packed, absmax);
  quantize(&p);
  CHECK_BYTES(p.weight.packed, packed, (size_t)p.sizes.packed_bytes);
  if (p.double_quant) {
    check_double_quantization(&p, absmax);
  } else {
    CHECK_BYTES(p.weight.absmax, absmax, (size_t)p.sizes.num_blocks * 4);
  }
  plain_dequantize(&p, decoded);
  dequantize(&p);
  CHECK_BYTES(p.decoded, decoded, (size_t)p.numel * 4);

  uint16_t* rounded = filled_memory(p.numel * 2);
  qn_dequantize_args args = dequantize_args(&p);
  args.output = rounded;
  args.dtype = QN_BFLOAT16;
  CHECK_OK(qn_dequantize_4bit(&args, NULL));
  for (int64_t e = 0; e < p.numel; ++e) CHECK(rounded[e] == bfloat16_of(decoded[e]));
  free(packed);
  free(absmax);
  free(decoded);
  free(rounded);
  free_problem(&p);
}

static void test_pinned_offset(void) {
  problem p = make_problem(5, 64, 64, QN_NF4, true);
  const float pinned = 0.25f;
  qn_quantize_args args = quantize_args(&p);
  args.pinned_offset = &pinned;
  int64_t bytes = 0;
  CHECK_OK(qn_quantize_4bit_workspace_bytes(&args, &bytes));
  void* workspace = workspace_memory(bytes);
  CHECK_OK(qn_quantize_4bit(&args, workspace, bytes, NULL));
  CHECK(p.weight.offset[0] == pinned);
  free(workspace);
  free_problem(&p);
}

/* The same 16-bit numbers give the same bytes as their fp32 selves. */
static void test_quantize_bfloat16(void) {
  problem p = make_problem(3, 96, 32, QN_NF4, false);
  uint16_t* input = filled_memory(p.numel * 2);
  for (int64_t e = 0; e < p.numel; ++e) {
    input[e] = bfloat16_of(p.input[e]);
    p.input[e] = float_of(input[e]);
  }
  uint8_t* packed = filled_memory(p.sizes.packed_bytes);
  float* absmax = filled_memory(p.sizes.num_blocks * 4);
  plain_quantize(&p, packed, absmax);
  qn_quantize_args args = quantize_args(&p);
  args.input = input;
  args.dtype = QN_BFLOAT16;
  CHECK_OK(qn_quantize_4bit(&args, NULL, 0, NULL));
  CHECK_BYTES(p.weight.packed, packed, (size_t)p.sizes.packed_bytes);
  CHECK_BYTES(p.weight.absmax, absmax, (size_t)p.sizes.num_blocks * 4);
  free(input);
  free(packed);
  free(absmax);
  free_problem(&p);
}

/* Both products of p's weight with m rows, which lie `gap` elements apart. */
static void test_products(problem p, int64_t m, int64_t gap) {
  quantize(&p);
  dequantize(&p);
  const int64_t N = p.rows, K = p.cols, x_stride = K + gap, y_stride = N + gap;
  float* x = filled_memory(m * x_stride * 4);
  float* bias = filled_memory(N * 4);
  float* y = filled_memory(m * y_stride * 4);
  float* dx = filled_memory(m * x_stride * 4);
  uint32_t state = 99;
  for (int64_t i = 0; i < m * x_stride; ++i) x[i] = number(&state);
  for (int64_t i = 0; i < N; ++i) bias[i] = number(&state);

  const qn_matmul_args args = {.struct_size = sizeof(args),
                               .x = x,
                               .m = m,
                               .x_row_stride = x_stride,
                               .weight = &p.weight,
                               .bias = bias,
                               .y = y,
                               .y_row_stride = y_stride,
                               .dtype = QN_FLOAT32};
  int64_t bytes = -1;
  qn_matmul_plan plan = {.struct_size = sizeof(plan)};
  CHECK_OK(qn_matmul_4bit_workspace_bytes(&args, &bytes));
  CHECK_OK(qn_matmul_4bit_plan(&args, &plan));
  CHECK(plan.workspace_bytes == bytes && bytes >= 0);
  CHECK(plan.prefers_dense == 0 || plan.prefers_dense == 1);
  void* workspace = workspace_memory(bytes);
  CHECK_OK(qn_matmul_4bit(&args, workspace, bytes, NULL));
  free(workspace);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = bias[n], size = fabs(sum);
      for (int64_t k = 0; k < K; ++k) {
        const double term = (double)x[i * x_stride + k] * p.decoded[n * K + k];
        sum += term;
        size += fabs(term);
      }
      CHECK(fabs(y[i * y_stride + n] - sum) <= 1e-6 * size);
    }
    CHECK(i + 1 == m || is_filled(y + i * y_stride + N, UNTOUCHED, (size_t)gap * 4));
  }

  const qn_matmul_transposed_args back = {.struct_size = sizeof(back),
                                          .dy = y,
                                          .m = m,
                                          .dy_row_stride = y_stride,
                                          .weight = &p.weight,
                                          .dx = dx,
                                          .dx_row_stride = x_stride,
                                          .dtype = QN_FLOAT32};
  CHECK_OK(qn_matmul_4bit_transposed_workspace_bytes(&back, &bytes));
  CHECK_OK(qn_matmul_4bit_transposed_plan(&back, &plan));
  CHECK(plan.workspace_bytes == bytes && bytes >= 0);
  workspace = workspace_memory(bytes);
  CHECK_OK(qn_matmul_4bit_transposed(&back, workspace, bytes, NULL));
  free(workspace);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0, size = 0;
      for (int64_t n = 0; n < N; ++n) {
        const double term = (double)y[i * y_stride + n] * p.decoded[n * K + k];
        sum += term;
        size += fabs(term);
      }
      CHECK(fabs(dx[i * x_stride + k] - sum) <= 1e-6 * size);
    }
  }
  free(x);
  free(bias);
  free(y);
  free(dx);
  free_problem(&p);
}

/* No elements: nothing is read, null arrays are fine. K = 0 leaves the bias. */
static void test_empty(void) {
  qn_weight weight = {.struct_size = sizeof(weight), .rows = 0, .cols = 64, .block_size = 64};
  const qn_quantize_args quantize = {.struct_size = sizeof(quantize), .output = &weight};
  CHECK_OK(qn_quantize_4bit(&quantize, NULL, 0, NULL));
  const qn_dequantize_args dequantize = {.struct_size = sizeof(dequantize), .weight = &weight};
  CHECK_OK(qn_dequantize_4bit(&dequantize, NULL));

  weight.rows = 2;
  weight.cols = 0;
  const float bias[2] = {1.5f, -2.0f};
  float y[2] = {0, 0};
  const qn_matmul_args matmul = {.struct_size = sizeof(matmul),
                                 .m = 1,
                                 .weight = &weight,
                                 .bias = bias,
                                 .y = y,
                                 .y_row_stride = 2};
  CHECK_OK(qn_matmul_4bit(&matmul, NULL, 0, NULL));
  CHECK_BYTES(y, bias, sizeof(y));
}

void test_operations(void) {
  static const struct {
    int64_t rows, cols, block_size;
  } shapes[] = {{1, 1, 32}, {7, 33, 32}, {4, 128, 64}, {3, 200, 128}, {40, 512, 64}};
  for (qn_quant_type type = QN_NF4; type <= QN_CUSTOM; ++type) {
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); ++s) {
      for (int nested = 0; nested < 2; ++nested) {
        test_quantize(
            make_problem(shapes[s].rows, shapes[s].cols, shapes[s].block_size, type, nested == 1));
        test_products(
            make_problem(shapes[s].rows, shapes[s].cols, shapes[s].block_size, type, nested == 1),
            1 + 2 * (int64_t)s, nested * 3);
      }
    }
  }
  test_pinned_offset();
  test_quantize_bfloat16();
  test_empty();
}
