/* The C ABI: everything the library offers, for C11 and for languages that call C.
 *
 * Status. Functions return a qn_status, except those that cannot fail and return what they say. A
 * call that fails leaves every output untouched, unless CUDA failed in the middle of it, and sets the
 * calling thread's qn_last_error_message(). No exception leaves a function. Besides what each function
 * lists, every function can return QN_INVALID_ARGUMENT (a null or misaligned pointer, an unknown
 * enum value, a bad struct_size), QN_OUT_OF_MEMORY and QN_INTERNAL_ERROR.
 *
 * Structs. Zero a struct, set struct_size to its sizeof, fill in the rest; `reserved` stays zero.
 * Later versions append members. A size that an earlier version had is accepted (the members it
 * lacks are zero); a larger one than this library knows is accepted if all bytes beyond are zero.
 *
 * Memory. Arrays are the caller's and stay so: the library keeps no pointer to them after a call, but
 * CUDA work that a call has queued goes on using them until it is done. Arrays of an operation are
 * all on one device, aligned to their elements, and do not overlap. Structs, custom codebooks and
 * texts are in host memory and may be freed when the call returns.
 *
 * Streams. `stream` is a cudaStream_t of the weight's device (NULL: the legacy default stream). An
 * operation on CUDA is queued there and not waited for, and can be captured in a graph. On the CPU
 * it is ignored: the operation is over when the call returns.
 *
 * Threads. Every function may be called from several threads at once. */
#pragma once

#include <stdint.h>

#include "qlora_native/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Vocabulary: fixed-width integers, their values, their names ---- */

/* The version of this ABI: that in the library's SONAME. */
#define QN_ABI_VERSION 0

typedef int32_t qn_status;
enum {
  QN_OK = 0,
  QN_INVALID_ARGUMENT = 1, /* an argument is wrong; nothing was touched */
  QN_UNSUPPORTED = 2,      /* no kernel of this build takes the call on this machine */
  QN_OUT_OF_MEMORY = 3,    /* memory could not be had */
  QN_CUDA_ERROR = 4,       /* the CUDA runtime or driver failed */
  QN_INTERNAL_ERROR = 5    /* anything else: a bug of the library */
};

typedef int32_t qn_dtype;
enum { QN_FLOAT32 = 0, QN_FLOAT16 = 1, QN_BFLOAT16 = 2 };

typedef int32_t qn_device_type;
enum { QN_CPU = 0, QN_CUDA = 1 };

typedef int32_t qn_quant_type;
enum { QN_NF4 = 0, QN_FP4 = 1, QN_INT4 = 2, QN_CUSTOM = 3 };

typedef int32_t qn_op;
enum {
  QN_QUANTIZE_4BIT = 0,
  QN_DEQUANTIZE_4BIT = 1,
  QN_MATMUL_4BIT = 2,
  QN_MATMUL_4BIT_TRANSPOSED = 3,
  QN_OPTIMIZER_STEP = 4,
  QN_GRADIENT_NORM = 5,
  QN_LORA_PROJECT = 6,
  QN_LORA_UPDATE = 7,
  QN_LORA_GRADIENT = 8,
  QN_GROUPED_MATMUL_4BIT = 9,
  QN_GROUPED_MATMUL_4BIT_TRANSPOSED = 10
};

enum {
  QN_KERNEL_NAME_BYTES = 64,   /* room for every kernel's name and its final zero */
  QN_WORKSPACE_ALIGNMENT = 256 /* bytes */
};

/* What a value is called ("invalid argument", "bfloat16", "cuda", "nf4", "matmul_4bit"), or
 * "unknown". Never null; static; cannot fail. */
QN_API const char* qn_status_string(qn_status status);
QN_API const char* qn_dtype_name(qn_dtype dtype);
QN_API const char* qn_device_type_name(qn_device_type device_type);
QN_API const char* qn_quant_type_name(qn_quant_type quant_type);
QN_API const char* qn_op_name(qn_op op);

/* What went wrong in the calling thread's last call that failed, with the offending values; ""
 * before the first. Never null; the library's, good until the thread's next call that fails. Calls
 * that succeed leave it alone. Cut after 4095 bytes. Cannot fail. */
QN_API const char* qn_last_error_message(void);

/* ---- How the library was built ---- */

typedef struct qn_build_info {
  uint64_t struct_size;
  const char* version;            /* "0.1.0" */
  const char* compiler;           /* name and version */
  const char* cuda_toolkit;       /* "13.0", or "" for a build without CUDA */
  const char* cuda_architectures; /* "80-real;90-real", or "" */
} qn_build_info;

/* The version's text and QN_ABI_VERSION as the library was compiled with them. Cannot fail. */
QN_API const char* qn_version(void);
QN_API int32_t qn_abi_version(void);

/* Fills in `info`; its texts are static. */
QN_API qn_status qn_describe_build(qn_build_info* info);

/* ---- Codebooks and sizes ---- */

typedef struct qn_codebook {
  uint64_t struct_size;
  qn_quant_type quant_type;
  float values[16];          /* what each code decodes to, before the scale */
  float decision_points[15]; /* ascending; the rank of x is the number of points p with x > p */
  uint8_t code_of_rank[16];
  uint8_t
      zero_code; /* stands for 0: blocks of zeros, and the low nibble after an odd last element */
  uint8_t reserved[7];
} qn_codebook;

/* Fills in `codebook`. `custom_values`: 16 finite, ascending floats for QN_CUSTOM, NULL for the
 * named types. Errors: QN_INVALID_ARGUMENT when the values are not so. */
QN_API qn_status qn_describe_codebook(qn_quant_type quant_type, const float* custom_values,
                                      qn_codebook* codebook);

/* Write the 256 values of a dynamic 8-bit map, ascending, to `values`: the signed one is that of the
 * double quantization and of first moments, the unsigned one that of second moments. */
QN_API qn_status qn_signed_dynamic_map(float* values);
QN_API qn_status qn_unsigned_dynamic_map(float* values);

typedef struct qn_weight_sizes {
  uint64_t struct_size;
  int64_t packed_bytes; /* (rows * cols + 1) / 2 */
  int64_t num_blocks;   /* scales: blocks of block_size elements, the last may be short */
  int64_t num_groups;   /* absmax2: groups of 256 blocks, the last may be short */
} qn_weight_sizes;

/* Fills in how long the arrays of a rows x cols weight are. Errors: QN_INVALID_ARGUMENT when a
 * dimension is negative, rows * cols * 8 is more than an int64_t holds, or block_size is not a power
 * of two from 32 to 4096. */
QN_API qn_status qn_describe_weight(int64_t rows, int64_t cols, int64_t block_size,
                                    qn_weight_sizes* sizes);

/* ---- Operations ---- */

/* A 4-bit matrix [rows, cols], row-major, where it lies. Element e is a nibble of packed[e / 2], the
 * high one for even e, and decodes to values[code] * scale(e / block_size), scale(b) being absmax[b]
 * or, when absmax_codes is not null (double quantization),
 *   signed_dynamic_map[absmax_codes[b]] * absmax2[b / 256] + offset[0],
 * every operation rounded to fp32. Only qn_quantize_4bit writes to the arrays: all others may be
 * given constant ones. An array of 0 elements may be null. */
typedef struct qn_weight {
  uint64_t struct_size;
  uint8_t* packed;       /* [packed_bytes] */
  float* absmax;         /* [num_blocks]; null with double quantization */
  uint8_t* absmax_codes; /* [num_blocks]; null without, and any other address for 0 blocks with */
  float* absmax2;        /* [num_groups]; with double quantization only */
  float* offset;         /* [1]; with double quantization only */
  int64_t rows;
  int64_t cols;
  int64_t block_size;         /* a power of two from 32 to 4096 */
  const float* custom_values; /* [16] on the host, for QN_CUSTOM; null for the named types */
  qn_quant_type quant_type;
  qn_device_type device_type;
  int32_t device_index; /* 0 on the CPU */
  int32_t reserved;
} qn_weight;

typedef struct qn_quantize_args {
  uint64_t struct_size;
  const void* input;       /* [rows * cols] of dtype */
  const qn_weight* output; /* says where everything is written */
  /* Null, or one float on the device that is the offset instead of the scales' mean. With double
   * quantization only. */
  const float* pinned_offset;
  qn_dtype dtype;
  int32_t reserved;
} qn_quantize_args;

/* Quantizes args->input to args->output, on every device to the same bytes; quantize.h defines them.
 * A block that holds a NaN or an infinity decodes to NaN.
 * `workspace`: `workspace_bytes` bytes on the device, aligned to QN_WORKSPACE_ALIGNMENT, at least
 * what ..._workspace_bytes says, which may be 0 (then `workspace` may be null). It is free again when
 * the operation is over. Errors: QN_INVALID_ARGUMENT, QN_UNSUPPORTED, QN_CUDA_ERROR. */
QN_API qn_status qn_quantize_4bit(const qn_quantize_args* args, void* workspace,
                                  int64_t workspace_bytes, void* stream);

/* The workspace that qn_quantize_4bit needs for these arguments. Reads no array, uses no stream.
 * Errors: as qn_quantize_4bit. */
QN_API qn_status qn_quantize_4bit_workspace_bytes(const qn_quantize_args* args,
                                                  int64_t* workspace_bytes);

typedef struct qn_dequantize_args {
  uint64_t struct_size;
  const qn_weight* weight;
  void* output; /* [rows * cols] of dtype */
  qn_dtype dtype;
  int32_t reserved;
} qn_dequantize_args;

/* Decodes a weight, rounding each fp32 product to dtype once.
 * Errors: QN_INVALID_ARGUMENT, QN_UNSUPPORTED, QN_CUDA_ERROR. */
QN_API qn_status qn_dequantize_4bit(const qn_dequantize_args* args, void* stream);

/* What a caller can ask before a product. */
typedef struct qn_matmul_plan {
  uint64_t struct_size;
  int64_t workspace_bytes; /* the workspace the product needs */
  /* 1 when, by measurement, decoding the weight and calling a tuned dense GEMM (cuBLAS, oneDNN) is
   * faster than the kernel that would run, else 0; 0 while a kernel is forced. */
  int32_t prefers_dense;
  int32_t reserved;
} qn_matmul_plan;

/* N = weight->rows, K = weight->cols. Strides are in elements, from one row to the next; elements of
 * a row are contiguous. */
typedef struct qn_matmul_args {
  uint64_t struct_size;
  const void* x;        /* [m, K] of dtype */
  int64_t m;            /* >= 0 */
  int64_t x_row_stride; /* >= K */
  const qn_weight* weight;
  const void* bias;     /* [N] of dtype, or null for none */
  void* y;              /* [m, N] of dtype */
  int64_t y_row_stride; /* >= N */
  qn_dtype dtype;
  int32_t reserved;
} qn_matmul_args;

/* Y = X * W^T + bias. Sums in fp32, rounds to dtype once, after the bias. The same arguments give
 * the same bits. m = 0 and N = 0 do nothing, K = 0 gives the bias. `workspace`: as for
 * qn_quantize_4bit. Errors: QN_INVALID_ARGUMENT, QN_UNSUPPORTED, QN_CUDA_ERROR. */
QN_API qn_status qn_matmul_4bit(const qn_matmul_args* args, void* workspace,
                                int64_t workspace_bytes, void* stream);

/* The workspace alone, and with it whether a dense GEMM is the better choice. Read no array, use no
 * stream. Errors: as qn_matmul_4bit. */
QN_API qn_status qn_matmul_4bit_workspace_bytes(const qn_matmul_args* args,
                                                int64_t* workspace_bytes);
QN_API qn_status qn_matmul_4bit_plan(const qn_matmul_args* args, qn_matmul_plan* plan);

/* As qn_matmul_args. */
typedef struct qn_matmul_transposed_args {
  uint64_t struct_size;
  const void* dy;        /* [m, N] of dtype */
  int64_t m;             /* >= 0 */
  int64_t dy_row_stride; /* >= N */
  const qn_weight* weight;
  void* dx;              /* [m, K] of dtype */
  int64_t dx_row_stride; /* >= K */
  qn_dtype dtype;
  int32_t reserved;
} qn_matmul_transposed_args;

/* dX = dY * W: the gradient of qn_matmul_4bit with respect to X, and all that is said there. */
QN_API qn_status qn_matmul_4bit_transposed(const qn_matmul_transposed_args* args, void* workspace,
                                           int64_t workspace_bytes, void* stream);
QN_API qn_status qn_matmul_4bit_transposed_workspace_bytes(const qn_matmul_transposed_args* args,
                                                           int64_t* workspace_bytes);
QN_API qn_status qn_matmul_4bit_transposed_plan(const qn_matmul_transposed_args* args,
                                                qn_matmul_plan* plan);

/* ---- Devices and CPU threads ---- */

typedef struct qn_device_info {
  uint64_t struct_size;
  int64_t memory_bytes;
  qn_device_type device_type;
  int32_t device_index;
  char name[256];     /* the vendor's; cut to fit, as is the next */
  char features[512]; /* instruction sets of a CPU; "sm_90, 132 SMs" of a GPU */
} qn_device_info;

/* Writes how many devices this build can use here to `count`: at least 1, the CPU. */
QN_API qn_status qn_device_count(int64_t* count);

/* Fills in what is known of device number `number`: 0 is the CPU, CUDA devices follow. Errors:
 * QN_INVALID_ARGUMENT when there is no such number. */
QN_API qn_status qn_describe_device(int64_t number, qn_device_info* info);

/* Writes why there is no CUDA device, or "" if there is one, to `text`, cut to `text_bytes` bytes
 * with the final zero. Errors: QN_INVALID_ARGUMENT when text_bytes < 1. */
QN_API qn_status qn_cuda_unavailable_reason(char* text, int64_t text_bytes);

/* The number of threads, the caller's included, that operations on the CPU use; process-wide.
 * Starts as the number of hardware threads that the process may run on. */
QN_API qn_status qn_cpu_threads(int32_t* threads);

/* Sets it. Errors: QN_INVALID_ARGUMENT when threads < 1. */
QN_API qn_status qn_set_cpu_threads(int32_t threads);

/* Runs body(context) on up to `threads` threads at once, the caller's among them, and returns when
 * every run is over; fewer runs are fine, one too. Neither throws nor unwinds. */
typedef void (*qn_cpu_executor)(int32_t threads, void (*body)(void* context), void* context);

/* From now on operations on the CPU, in the whole process, run on the threads of `executor`, which
 * has to stay callable; NULL: on the library's own. */
QN_API qn_status qn_set_cpu_executor(qn_cpu_executor executor);

/* ---- Kernels ---- */

typedef struct qn_kernel_info {
  uint64_t struct_size;
  qn_op op;
  qn_device_type device_type;
  int32_t usable; /* 1 when this machine's hardware can run it, else 0 */
  int32_t reserved;
  char name[64];     /* e.g. "avx512"; unique within an op and a device type */
  char why_not[512]; /* when not usable; cut to fit */
} qn_kernel_info;

/* Writes how many kernels this build has to `count`. */
QN_API qn_status qn_kernel_count(int64_t* count);

/* Fills in what is known of kernel number `number`, from 0, in the order in which kernels are tried.
 * Errors: QN_INVALID_ARGUMENT when there is no such number. */
QN_API qn_status qn_describe_kernel(int64_t number, qn_kernel_info* info);

/* From now on, in the whole process, `op` on devices of that type runs the kernel `name` or returns
 * QN_UNSUPPORTED, until qn_unforce_kernel. For tests and measurements. Errors: QN_INVALID_ARGUMENT
 * when there is no kernel `name`; the message lists those there are. */
QN_API qn_status qn_force_kernel(qn_op op, qn_device_type device_type, const char* name);
QN_API qn_status qn_unforce_kernel(qn_op op, qn_device_type device_type);

/* These write a kernel's name with its final zero to `name`, which has `name_bytes` bytes. Errors:
 * QN_INVALID_ARGUMENT when that is too little; QN_KERNEL_NAME_BYTES always suffice.
 * Forced: the kernel in force, "" for the automatic choice. Last: the one that the process's last
 * call of `op` ran, "" before the first. */
QN_API qn_status qn_forced_kernel(qn_op op, qn_device_type device_type, char* name,
                                  int64_t name_bytes);
QN_API qn_status qn_last_kernel(qn_op op, char* name, int64_t name_bytes);

/* And the one that the operation would run for these arguments. Read no array, use no stream.
 * Errors: also as the operation. */
QN_API qn_status qn_quantize_4bit_selected_kernel(const qn_quantize_args* args, char* name,
                                                  int64_t name_bytes);
QN_API qn_status qn_dequantize_4bit_selected_kernel(const qn_dequantize_args* args, char* name,
                                                    int64_t name_bytes);
QN_API qn_status qn_matmul_4bit_selected_kernel(const qn_matmul_args* args, char* name,
                                                int64_t name_bytes);
QN_API qn_status qn_matmul_4bit_transposed_selected_kernel(const qn_matmul_transposed_args* args,
                                                           char* name, int64_t name_bytes);

#ifdef __cplusplus
}
#endif
