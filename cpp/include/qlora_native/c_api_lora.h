/* The C ABI's low-rank adapters: the passes over big matrices that they are made of, and the product
 * of a 4-bit matrix and its adapter, forward and backward. lora.h says what is computed; c_api.h has
 * the rules that hold here too.
 *
 * Matrices are row-major; strides are in elements, from one row to the next, and at least as long as
 * a row; elements of a row are contiguous. Everything of a call is on one device. Outputs must not
 * overlap inputs. Dropout (dropout.h defines the mask): dropout_p from 0, for none, to 1. */
#pragma once

#include "qlora_native/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* t = scaling * D(x) * factor^T, or scaling * D(x) * factor when it is transposed. */
typedef struct qn_lora_project_args {
  uint64_t struct_size;
  const void* x;      /* [m, c] of dtype */
  const void* factor; /* [r, c], or [c, r] when transposed, of factor_dtype */
  void* t;            /* [m, r] of dtype */
  int64_t x_row_stride;
  int64_t factor_row_stride;
  int64_t t_row_stride;
  int64_t m;
  int64_t c;
  int64_t r;
  uint64_t dropout_seed;
  uint64_t dropout_offset;
  float dropout_p;
  float scaling;
  qn_dtype dtype;
  qn_dtype factor_dtype;     /* dtype or QN_FLOAT32 */
  int32_t factor_transposed; /* 1 or 0 */
  qn_device_type device_type;
  int32_t device_index; /* 0 on the CPU */
  int32_t reserved;
} qn_lora_project_args;

/* Errors of this and all that follow: QN_INVALID_ARGUMENT, QN_UNSUPPORTED, QN_CUDA_ERROR.
 * `workspace`: as for qn_quantize_4bit; `stream` is one of the call's device. */
QN_API qn_status qn_lora_project(const qn_lora_project_args* args, void* workspace,
                                 int64_t workspace_bytes, void* stream);

/* The workspace alone; with it whether a dense GEMM is the better choice, never under dropout; the
 * kernel that the operation would run, as those of c_api.h. Read no array, use no stream. */
QN_API qn_status qn_lora_project_workspace_bytes(const qn_lora_project_args* args,
                                                 int64_t* workspace_bytes);
QN_API qn_status qn_lora_project_plan(const qn_lora_project_args* args, qn_matmul_plan* plan);
QN_API qn_status qn_lora_project_selected_kernel(const qn_lora_project_args* args, char* name,
                                                 int64_t name_bytes);

/* y += D(scaling * t * factor^T), or D(scaling * t * factor) when it is transposed. */
typedef struct qn_lora_update_args {
  uint64_t struct_size;
  const void* t;      /* [m, r] of dtype */
  const void* factor; /* [c, r], or [r, c] when transposed, of factor_dtype */
  void* y;            /* [m, c] of dtype, read and written */
  int64_t t_row_stride;
  int64_t factor_row_stride;
  int64_t y_row_stride;
  int64_t m;
  int64_t c;
  int64_t r;
  uint64_t dropout_seed;
  uint64_t dropout_offset;
  float dropout_p;
  float scaling;
  qn_dtype dtype;
  qn_dtype factor_dtype;     /* dtype or QN_FLOAT32 */
  int32_t factor_transposed; /* 1 or 0 */
  qn_device_type device_type;
  int32_t device_index; /* 0 on the CPU */
  int32_t reserved;
} qn_lora_update_args;

/* As those of qn_lora_project. */
QN_API qn_status qn_lora_update(const qn_lora_update_args* args, void* workspace,
                                int64_t workspace_bytes, void* stream);
QN_API qn_status qn_lora_update_workspace_bytes(const qn_lora_update_args* args,
                                                int64_t* workspace_bytes);
QN_API qn_status qn_lora_update_plan(const qn_lora_update_args* args, qn_matmul_plan* plan);
QN_API qn_status qn_lora_update_selected_kernel(const qn_lora_update_args* args, char* name,
                                                int64_t name_bytes);

/* grad = scaling * s^T * D(v), or its transpose. */
typedef struct qn_lora_gradient_args {
  uint64_t struct_size;
  const void* s; /* [m, r] of dtype */
  const void* v; /* [m, c] of dtype */
  void* grad;    /* [r, c], or [c, r] when transposed, of grad_dtype */
  int64_t s_row_stride;
  int64_t v_row_stride;
  int64_t grad_row_stride;
  int64_t m;
  int64_t c;
  int64_t r;
  uint64_t dropout_seed;
  uint64_t dropout_offset;
  float dropout_p;
  float scaling;
  qn_dtype dtype;
  qn_dtype grad_dtype; /* dtype or QN_FLOAT32 */
  int32_t transposed;  /* 1 or 0 */
  qn_device_type device_type;
  int32_t device_index; /* 0 on the CPU */
  int32_t reserved;
} qn_lora_gradient_args;

/* As those of qn_lora_project. */
QN_API qn_status qn_lora_gradient(const qn_lora_gradient_args* args, void* workspace,
                                  int64_t workspace_bytes, void* stream);
QN_API qn_status qn_lora_gradient_workspace_bytes(const qn_lora_gradient_args* args,
                                                  int64_t* workspace_bytes);
QN_API qn_status qn_lora_gradient_plan(const qn_lora_gradient_args* args, qn_matmul_plan* plan);
QN_API qn_status qn_lora_gradient_selected_kernel(const qn_lora_gradient_args* args, char* name,
                                                  int64_t name_bytes);

/* t = D(x) * a^T and y = x * W^T + bias + scaling * t * b^T; N = weight->rows, K = weight->cols. */
typedef struct qn_lora_forward_args {
  uint64_t struct_size;
  const void* x; /* [m, K] of dtype */
  const qn_weight* weight;
  const void* bias; /* [N] of dtype, or null for none */
  const void* a;    /* [r, K] of a_dtype */
  const void* b;    /* [N, r] of b_dtype */
  void* t;          /* [m, r] of dtype: what qn_lora_backward takes; null: not kept */
  void* y;          /* [m, N] of dtype */
  int64_t x_row_stride;
  int64_t a_row_stride;
  int64_t b_row_stride;
  int64_t t_row_stride; /* not looked at without t */
  int64_t y_row_stride;
  int64_t m;
  int64_t r;
  uint64_t dropout_seed;
  uint64_t dropout_offset;
  float dropout_p;
  float scaling;
  qn_dtype dtype;
  qn_dtype a_dtype; /* dtype or QN_FLOAT32, as b_dtype */
  qn_dtype b_dtype;
  int32_t reserved;
} qn_lora_forward_args;

QN_API qn_status qn_lora_forward(const qn_lora_forward_args* args, void* workspace,
                                 int64_t workspace_bytes, void* stream);
QN_API qn_status qn_lora_forward_workspace_bytes(const qn_lora_forward_args* args,
                                                 int64_t* workspace_bytes);

/* The gradients of qn_lora_forward, with u = scaling * dy * b. An output that is null is not
 * computed; inputs of which only it is made may be null then, but for the weight, and their strides
 * and dtypes are not looked at. */
typedef struct qn_lora_backward_args {
  uint64_t struct_size;
  const void* dy; /* [m, N] of dtype */
  const void* x;  /* [m, K] of dtype; for da */
  const void* t;  /* [m, r] of dtype, of the forward pass; for db */
  const qn_weight* weight;
  const void* a; /* [r, K] of a_dtype; for dx */
  const void* b; /* [N, r] of b_dtype; for dx and da */
  void* dx;      /* [m, K] of dtype = dy * W + D(u * a) */
  void* da;      /* [r, K] of da_dtype = u^T * D(x) */
  void* db;      /* [N, r] of db_dtype = scaling * dy^T * t */
  int64_t dy_row_stride;
  int64_t x_row_stride;
  int64_t t_row_stride;
  int64_t a_row_stride;
  int64_t b_row_stride;
  int64_t dx_row_stride;
  int64_t da_row_stride;
  int64_t db_row_stride;
  int64_t m;
  int64_t r;
  uint64_t dropout_seed; /* those of the forward pass, as offset and p */
  uint64_t dropout_offset;
  float dropout_p;
  float scaling;
  qn_dtype dtype;
  qn_dtype a_dtype; /* dtype or QN_FLOAT32, as those that follow */
  qn_dtype b_dtype;
  qn_dtype da_dtype;
  qn_dtype db_dtype;
  int32_t reserved;
} qn_lora_backward_args;

QN_API qn_status qn_lora_backward(const qn_lora_backward_args* args, void* workspace,
                                  int64_t workspace_bytes, void* stream);
QN_API qn_status qn_lora_backward_workspace_bytes(const qn_lora_backward_args* args,
                                                  int64_t* workspace_bytes);

#ifdef __cplusplus
}
#endif
