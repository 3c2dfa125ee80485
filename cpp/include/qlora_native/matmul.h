// Products with a 4-bit matrix W[N, K] (weight.rows = N, weight.cols = K).
#pragma once

#include <cstdint>

#include "qlora_native/export.h"
#include "qlora_native/quantized.h"
#include "qlora_native/stream.h"
#include "qlora_native/views.h"

namespace qlora_native {

struct MatmulArgs {
  MatrixView x;          ///< [M, K]
  QuantizedView weight;  ///< [N, K]
  VectorView bias;       ///< [N] of x's dtype, or data == nullptr for none
  MutableMatrixView y;   ///< [M, N] of x's dtype
};

/// Scratch bytes `matmul_4bit` needs for these arguments. Throws as it does.
QN_API int64_t matmul_4bit_workspace_bytes(const MatmulArgs& args);

/// Y = X * W^T + bias. Accumulates in fp32, rounds to y's dtype once, after the bias is added.
/// Deterministic: the same arguments give the same bits. M = 0 and N = 0 are allowed and do
/// nothing; K = 0 gives the bias. Does not wait for `stream`; can be captured in a CUDA graph.
/// Throws InvalidArgument (before y is touched), Unsupported, CudaError.
QN_API void matmul_4bit(const MatmulArgs& args, Workspace workspace, Stream stream);

/// What a caller can ask before a product.
struct MatmulPlan {
  /// Whether, by measurement, dequantizing the weight and calling a tuned dense GEMM (cuBLAS,
  /// oneDNN) beats the kernel that would run. For callers that have such a library at hand; false
  /// while a kernel is forced.
  bool prefers_dense = false;
  int64_t workspace_bytes = 0;  ///< as `matmul_4bit_workspace_bytes`
};

/// Both answers for the price of one. Throws as `matmul_4bit` does.
QN_API MatmulPlan matmul_4bit_plan(const MatmulArgs& args);

struct MatmulTransposedArgs {
  MatrixView dy;         ///< [M, N]
  QuantizedView weight;  ///< [N, K]
  MutableMatrixView dx;  ///< [M, K] of dy's dtype
};

/// Scratch bytes `matmul_4bit_transposed` needs for these arguments. Throws as it does.
QN_API int64_t matmul_4bit_transposed_workspace_bytes(const MatmulTransposedArgs& args);

/// dX = dY * W, from the same storage: the gradient of `matmul_4bit` with respect to X.
/// Same guarantees as `matmul_4bit`.
QN_API void matmul_4bit_transposed(const MatmulTransposedArgs& args, Workspace workspace,
                                   Stream stream);

/// As `matmul_4bit_plan`.
QN_API MatmulPlan matmul_4bit_transposed_plan(const MatmulTransposedArgs& args);

}  // namespace qlora_native
