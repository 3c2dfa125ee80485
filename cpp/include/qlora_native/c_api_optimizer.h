/* The C ABI's optimizers: steps of many tensors at once, and the norm of their gradients. optimizer.h
 * says what is computed; c_api.h has the rules that hold here too. */
#pragma once

#include "qlora_native/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t qn_optimizer_algorithm;
enum { QN_ADAMW = 0, QN_LION = 1 };

typedef int32_t qn_state_format;
enum { QN_STATE_FLOAT32 = 0, QN_STATE_DYNAMIC_8BIT = 1 };

/* One parameter, or a run of consecutive elements of one, and what belongs to it: contiguous arrays
 * on the call's device. An array of 0 elements may be null. optimizer.h defines the 8-bit format. */
typedef struct qn_optimizer_tensor {
  uint64_t struct_size;
  void* param;      /* [numel] of param_dtype */
  const void* grad; /* [numel] of grad_dtype */
  void* state1;     /* [numel] the first moment: floats, or codes of the signed dynamic map */
  void* state2;     /* [numel] the second: floats, or codes of the unsigned map; null for Lion */
  float* absmax1;   /* [ceil(numel / 256)] for 8-bit states, else null */
  float* absmax2;   /* the same; null for Lion */
  float* master;    /* null, or [numel] of which a 16-bit parameter is the rounded copy */
  float* step;      /* [1] how many steps were taken */
  int64_t numel;
  int64_t first_element; /* where the run starts in the parameter: a multiple of 256 */
  qn_dtype param_dtype;
  qn_dtype grad_dtype; /* param_dtype or QN_FLOAT32 */
  qn_state_format state_format;
  int32_t group;          /* index into the call's groups */
  uint32_t random_stream; /* tells the random numbers of one parameter from another's */
  int32_t keeps_step;     /* 1 for all but the last of several runs of one parameter, else 0 */
} qn_optimizer_tensor;

typedef struct qn_optimizer_group {
  uint64_t struct_size;
  double lr;
  double beta1; /* from 0 to below 1, as beta2 */
  double beta2;
  double eps; /* not used by Lion */
  double weight_decay;
  const float* lr_on_device; /* null, or one float on the device instead of lr */
  int32_t maximize;          /* 1 or 0 */
  int32_t reserved;
} qn_optimizer_group;

typedef struct qn_optimizer_args {
  uint64_t struct_size;
  const qn_optimizer_tensor* const* tensors; /* [num_tensors] */
  const qn_optimizer_group* const* groups;   /* [num_groups] */
  int64_t num_tensors;
  int64_t num_groups;
  const float* grad_scale; /* null, or one float on the device that gradients are divided by */
  const float* found_inf;  /* null, or one float there: when it is not 0, nothing is changed */
  const float* grad_norm;  /* null, or what qn_gradient_norm wrote there */
  /* Above 0, gradients are multiplied by min(1, max_norm / (grad_norm / grad_scale + 1e-6)). */
  double max_norm;
  uint64_t seed; /* of stochastic rounding */
  qn_optimizer_algorithm algorithm;
  qn_device_type device_type;
  int32_t device_index;        /* 0 on the CPU */
  int32_t skip_nonfinite;      /* 1: when grad_norm is not finite, nothing is changed; or 0 */
  int32_t stochastic_rounding; /* 1: of 16-bit parameters without a master; or 0 */
  int32_t reserved;
} qn_optimizer_args;

/* One step of every tensor: parameters, states and step counts, to the same bits on every device
 * (but for clipping, which depends on a norm's last bits). `stream` is one of the call's device.
 * `workspace`: as for qn_quantize_4bit.
 * Errors: QN_INVALID_ARGUMENT, QN_UNSUPPORTED, QN_CUDA_ERROR. */
QN_API qn_status qn_optimizer_step(const qn_optimizer_args* args, void* workspace,
                                   int64_t workspace_bytes, void* stream);
QN_API qn_status qn_optimizer_step_workspace_bytes(const qn_optimizer_args* args,
                                                   int64_t* workspace_bytes);

typedef struct qn_gradient_norm_args {
  uint64_t struct_size;
  const void* const* grads; /* [num_grads] addresses of arrays */
  const int64_t* sizes;     /* [num_grads] in elements */
  const qn_dtype* dtypes;   /* [num_grads] */
  int64_t num_grads;
  float* norm; /* [1] */
  qn_device_type device_type;
  int32_t device_index; /* 0 on the CPU */
} qn_gradient_norm_args;

/* Writes the L2 norm of all arrays, as one vector, to args->norm on the device. The same arguments
 * give the same bits on one device. Everything else is as for qn_optimizer_step. */
QN_API qn_status qn_gradient_norm(const qn_gradient_norm_args* args, void* workspace,
                                  int64_t workspace_bytes, void* stream);
QN_API qn_status qn_gradient_norm_workspace_bytes(const qn_gradient_norm_args* args,
                                                  int64_t* workspace_bytes);

/* The kernel that the operation would run for these arguments; as those of c_api.h. */
QN_API qn_status qn_optimizer_step_selected_kernel(const qn_optimizer_args* args, char* name,
                                                   int64_t name_bytes);
QN_API qn_status qn_gradient_norm_selected_kernel(const qn_gradient_norm_args* args, char* name,
                                                  int64_t name_bytes);

#ifdef __cplusplus
}
#endif
