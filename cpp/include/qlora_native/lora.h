// Low-rank adapters: the three passes over a big matrix that they are made of, and the product of a
// 4-bit matrix and its adapter, forward and backward.
//
// Below, D is the dropout of an operation (dropout.h), over the columns of the big matrix, and
// "factor" one of the adapter's matrices A [r, K] and B [N, r]. All arrays of one call but factors and
// gradients have one dtype; each of those has the same dtype or is fp32. Where the dtype has 16
// bits, an fp32 factor is rounded to it before it is multiplied. Sums and what is done to them are
// fp32, rounded once when they are stored.
//
// Every operation is deterministic: the same arguments give the same bits. None waits for the
// stream; all can be captured in a CUDA graph, which then replays the same dropout. Outputs must
// not overlap inputs. All throw InvalidArgument (before anything is written), Unsupported,
// CudaError. `<op>_workspace_bytes` says how much scratch memory the call needs, and throws as the
// call does; so does `<op>_plan`, which also says whether a tuned dense product beats the kernel that
// would run: never under dropout, for which a dense product has no equal.
#pragma once

#include <cstdint>

#include "qlora_native/dropout.h"
#include "qlora_native/export.h"
#include "qlora_native/matmul.h"
#include "qlora_native/quantized.h"
#include "qlora_native/stream.h"
#include "qlora_native/views.h"

namespace qlora_native {

/// t = scaling * D(x) * factor^T.
struct LoraProjectArgs {
  MatrixView x;            ///< [M, C]
  MatrixView factor;       ///< [r, C], or [C, r] when transposed
  bool factor_transposed;  ///< t = scaling * D(x) * factor
  float scaling;
  Dropout dropout;
  MutableMatrixView t;  ///< [M, r]
};

/// C = 0 gives zeros; M = 0 and r = 0 do nothing.
QN_API void lora_project(const LoraProjectArgs& args, Workspace workspace, Stream stream);
QN_API int64_t lora_project_workspace_bytes(const LoraProjectArgs& args);
QN_API MatmulPlan lora_project_plan(const LoraProjectArgs& args);

/// y += D(scaling * t * factor^T).
struct LoraUpdateArgs {
  MatrixView t;            ///< [M, r]
  MatrixView factor;       ///< [C, r], or [r, C] when transposed
  bool factor_transposed;  ///< y += D(scaling * t * factor)
  float scaling;
  Dropout dropout;
  MutableMatrixView y;  ///< [M, C], read and written
};

/// M = 0, C = 0 and r = 0 do nothing.
QN_API void lora_update(const LoraUpdateArgs& args, Workspace workspace, Stream stream);
QN_API int64_t lora_update_workspace_bytes(const LoraUpdateArgs& args);
QN_API MatmulPlan lora_update_plan(const LoraUpdateArgs& args);

/// grad = scaling * s^T * D(v), or its transpose.
struct LoraGradientArgs {
  MatrixView s;  ///< [M, r]
  MatrixView v;  ///< [M, C]
  float scaling;
  Dropout dropout;
  bool transposed;
  MutableMatrixView grad;  ///< [r, C], or [C, r] when transposed
};

/// M = 0 gives zeros; C = 0 and r = 0 do nothing.
QN_API void lora_gradient(const LoraGradientArgs& args, Workspace workspace, Stream stream);
QN_API int64_t lora_gradient_workspace_bytes(const LoraGradientArgs& args);
QN_API MatmulPlan lora_gradient_plan(const LoraGradientArgs& args);

/// t = D(x) * A^T and y = x * W^T + bias + scaling * t * B^T.
struct LoraForwardArgs {
  MatrixView x;          ///< [M, K]
  QuantizedView weight;  ///< [N, K]
  VectorView bias;       ///< [N] of x's dtype, or data == nullptr for none
  MatrixView a;          ///< [r, K]
  MatrixView b;          ///< [N, r]
  float scaling;
  Dropout dropout;
  /// [M, r]: what `lora_backward` takes. With data == nullptr it stays in the workspace.
  MutableMatrixView t;
  MutableMatrixView y;  ///< [M, N]
};

QN_API void lora_forward(const LoraForwardArgs& args, Workspace workspace, Stream stream);
QN_API int64_t lora_forward_workspace_bytes(const LoraForwardArgs& args);

/// The gradients of `lora_forward`, with u = scaling * dy * B in the workspace. An output whose data
/// is null is not computed, and nothing is asked of what only it is made of.
struct LoraBackwardArgs {
  MatrixView dy;         ///< [M, N]
  MatrixView x;          ///< [M, K]; for da
  MatrixView t;          ///< [M, r], of the forward pass; for db
  QuantizedView weight;  ///< [N, K]; for dx
  MatrixView a;          ///< [r, K]; for dx
  MatrixView b;          ///< [N, r]; for dx and da
  float scaling;
  Dropout dropout;       ///< that of the forward pass
  MutableMatrixView dx;  ///< [M, K] = dy * W + D(u * A)
  MutableMatrixView da;  ///< [r, K] = u^T * D(x)
  MutableMatrixView db;  ///< [N, r] = scaling * dy^T * t
};

QN_API void lora_backward(const LoraBackwardArgs& args, Workspace workspace, Stream stream);
QN_API int64_t lora_backward_workspace_bytes(const LoraBackwardArgs& args);

}  // namespace qlora_native
