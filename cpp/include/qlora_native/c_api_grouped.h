/* The C ABI's products of groups of rows with a 4-bit matrix each, as a mixture of experts needs
 * them. grouped_matmul.h says what is computed; c_api.h has the rules that hold here too. */
#pragma once

#include "qlora_native/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t qn_index_type;
enum { QN_INT32 = 0, QN_INT64 = 1 };

/* `count` matrices of one shape and format, each quantized by itself. A stride says how far the same
 * array of the next matrix is; strides of arrays that `first` does not have count for nothing. */
typedef struct qn_weight_stack {
  uint64_t struct_size;
  const qn_weight* first; /* matrix 0; its arrays may be null when count is 0 */
  int64_t count;
  int64_t packed_stride;  /* in bytes, at least what one matrix takes */
  int64_t absmax_stride;  /* in elements, of absmax or absmax_codes */
  int64_t absmax2_stride; /* in floats */
  int64_t offset_stride;  /* in floats, at least 1 */
} qn_weight_stack;

/* N = first->rows, K = first->cols. Strides of matrices are in elements, from one row to the next. */
typedef struct qn_grouped_matmul_args {
  uint64_t struct_size;
  const void* x;        /* [m, K] of dtype, the rows of group 0 first */
  int64_t m;            /* >= 0 */
  int64_t x_row_stride; /* >= K */
  /* [count] of index_type, on the weights' device: where the rows of each group end. They ascend
   * from 0 to at most m; rows from the last on belong to no group. */
  const void* group_ends;
  const qn_weight_stack* weights;
  const void* bias;        /* [count, N] of dtype, or null for none */
  int64_t bias_row_stride; /* >= N with a bias */
  void* y;                 /* [m, N] of dtype */
  int64_t y_row_stride;    /* >= N */
  qn_dtype dtype;
  qn_index_type index_type;
} qn_grouped_matmul_args;

/* Y[rows of e] = X[rows of e] * W[e]^T + bias[e] for every group e; rows of no group are zero. Sums
 * in fp32, rounds to dtype once, after the bias. The same arguments give the same bits. m = 0 and
 * N = 0 do nothing, K = 0 gives the bias. On CUDA one launch, which reads the ends on the device:
 * there an end that is out of order or range counts as the nearest that is not; on the CPU it is
 * QN_INVALID_ARGUMENT. `workspace`: as for qn_quantize_4bit.
 * Errors: QN_INVALID_ARGUMENT, QN_UNSUPPORTED, QN_CUDA_ERROR. */
QN_API qn_status qn_grouped_matmul_4bit(const qn_grouped_matmul_args* args, void* workspace,
                                        int64_t workspace_bytes, void* stream);

/* The workspace alone; with it whether qn_matmul_4bit_plan would prefer a dense GEMM for some of the
 * groups, which on CUDA is 0; and the kernel that would run, as qn_matmul_4bit_selected_kernel. On the
 * CPU they read the ends of groups, and no other array. Errors: as qn_grouped_matmul_4bit. */
QN_API qn_status qn_grouped_matmul_4bit_workspace_bytes(const qn_grouped_matmul_args* args,
                                                        int64_t* workspace_bytes);
QN_API qn_status qn_grouped_matmul_4bit_plan(const qn_grouped_matmul_args* args,
                                             qn_matmul_plan* plan);
QN_API qn_status qn_grouped_matmul_4bit_selected_kernel(const qn_grouped_matmul_args* args,
                                                        char* name, int64_t name_bytes);

/* As qn_grouped_matmul_args. */
typedef struct qn_grouped_matmul_transposed_args {
  uint64_t struct_size;
  const void* dy;         /* [m, N] of dtype, the rows of group 0 first */
  int64_t m;              /* >= 0 */
  int64_t dy_row_stride;  /* >= N */
  const void* group_ends; /* [count] of index_type, as above */
  const qn_weight_stack* weights;
  void* dx;              /* [m, K] of dtype */
  int64_t dx_row_stride; /* >= K */
  qn_dtype dtype;
  qn_index_type index_type;
} qn_grouped_matmul_transposed_args;

/* dX[rows of e] = dY[rows of e] * W[e]: the gradient of qn_grouped_matmul_4bit with respect to X, and
 * all that is said there. */
QN_API qn_status qn_grouped_matmul_4bit_transposed(const qn_grouped_matmul_transposed_args* args,
                                                   void* workspace, int64_t workspace_bytes,
                                                   void* stream);
QN_API qn_status qn_grouped_matmul_4bit_transposed_workspace_bytes(
    const qn_grouped_matmul_transposed_args* args, int64_t* workspace_bytes);
QN_API qn_status qn_grouped_matmul_4bit_transposed_plan(
    const qn_grouped_matmul_transposed_args* args, qn_matmul_plan* plan);
QN_API qn_status qn_grouped_matmul_4bit_transposed_selected_kernel(
    const qn_grouped_matmul_transposed_args* args, char* name, int64_t name_bytes);

#ifdef __cplusplus
}
#endif
