/* Quantizes a matrix to NF4, multiplies by it from the 4-bit codes, and compares the product with
 * that of the fp32 matrix. */
#include <qlora_native/c_api.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { M = 4, N = 256, K = 512, BLOCK_SIZE = 64, BLOCKS = N * K / BLOCK_SIZE };

static float w[N * K], x[M * K], y[M * N];
/* W in 4 bits: two codes a byte, and a scale for every block of 64 elements. */
static uint8_t packed[N * K / 2];
static float absmax[BLOCKS];

static void check(qn_status status) {
  if (status == QN_OK) return;
  fprintf(stderr, "%s: %s\n", qn_status_string(status), qn_last_error_message());
  exit(1);
}

/* Numbers in [-1, 1) that look random. */
static void fill(float* values, int count, uint32_t seed) {
  for (int i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = (float)(seed >> 8) / 8388608.0f - 1.0f;
  }
}

static void* allocate_workspace(int64_t bytes) {
  const size_t unit = QN_WORKSPACE_ALIGNMENT;
  void* workspace = aligned_alloc(unit, ((size_t)bytes / unit + 1) * unit);
  if (workspace == NULL) exit(1);
  return workspace;
}

int main(void) {
  fill(w, N * K, 1);
  fill(x, M * K, 2);

  const qn_weight weight = {.struct_size = sizeof(weight),
                            .packed = packed,
                            .absmax = absmax,
                            .rows = N,
                            .cols = K,
                            .block_size = BLOCK_SIZE,
                            .quant_type = QN_NF4};
  const qn_quantize_args quantize = {
      .struct_size = sizeof(quantize), .input = w, .output = &weight, .dtype = QN_FLOAT32};
  int64_t bytes = 0;
  check(qn_quantize_4bit_workspace_bytes(&quantize, &bytes));
  void* workspace = allocate_workspace(bytes);
  check(qn_quantize_4bit(&quantize, workspace, bytes, NULL));
  free(workspace);

  const qn_matmul_args matmul = {.struct_size = sizeof(matmul),
                                 .x = x,
                                 .m = M,
                                 .x_row_stride = K,
                                 .weight = &weight,
                                 .y = y,
                                 .y_row_stride = N,
                                 .dtype = QN_FLOAT32};
  check(qn_matmul_4bit_workspace_bytes(&matmul, &bytes));
  workspace = allocate_workspace(bytes);
  check(qn_matmul_4bit(&matmul, workspace, bytes, NULL));
  free(workspace);

  double error = 0, norm = 0;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      double exact = 0;
      for (int k = 0; k < K; ++k) exact += (double)x[m * K + k] * w[n * K + k];
      error += (y[m * N + n] - exact) * (y[m * N + n] - exact);
      norm += exact * exact;
    }
  }
  printf("qlora_native %s: %zu bytes of fp32 in %zu of NF4\n", qn_version(), sizeof(w),
         sizeof(packed) + sizeof(absmax));
  printf("relative error of the product: %.4f\n", sqrt(error / norm));
  return 0;
}
