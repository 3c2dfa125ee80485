// Products of groups of rows with a 4-bit matrix each, as a mixture of experts needs them: one call
// for all groups, whose sizes are read where they lie.
#pragma once

#include <cstdint>

#include "qlora_native/export.h"
#include "qlora_native/matmul.h"
#include "qlora_native/quantized.h"
#include "qlora_native/stream.h"
#include "qlora_native/views.h"

namespace qlora_native {

enum class IndexType : int32_t { kInt32 = 0, kInt64 = 1 };

/// Where each group of rows ends: group e is rows [ends[e - 1], ends[e]), group 0 starts at row 0.
/// Groups may be empty; rows from the last end on belong to none. The ends ascend from 0 to at most
/// the number of rows. A CPU checks that. A CUDA device, which nobody waits for, takes an end that is
/// out of order or range for the nearest that is not, and touches no memory outside of the arrays.
struct GroupEnds {
  const void* data = nullptr;  ///< [size], on the operation's device
  int64_t size = 0;            ///< E
  IndexType type = IndexType::kInt64;
  Device device;

  /// The end of a group, where `data` is memory of the host.
  int64_t operator[](int64_t group) const {
    if (type == IndexType::kInt32) return static_cast<const int32_t*>(data)[group];
    return static_cast<const int64_t*>(data)[group];
  }
};

struct GroupedMatmulArgs {
  MatrixView x;                ///< [M, K], the rows of group 0 first
  GroupEnds ends;              ///< [E]
  QuantizedStackView weights;  ///< E times [N, K]
  MatrixView bias;             ///< [E, N] of x's dtype, or data == nullptr for none
  MutableMatrixView y;         ///< [M, N] of x's dtype
};

/// Scratch bytes `grouped_matmul_4bit` needs for these arguments. On a CPU it reads the ends. Throws
/// as the operation does.
QN_API int64_t grouped_matmul_4bit_workspace_bytes(const GroupedMatmulArgs& args);

/// Y[rows of e] = X[rows of e] * W[e]^T + bias[e] for every group e; rows of no group are zero.
/// Accumulates in fp32, rounds to y's dtype once, after the bias is added. Deterministic: the same
/// arguments give the same bits. A matrix whose group is empty is not read. M = 0 and N = 0 do
/// nothing, K = 0 gives the bias. On CUDA it is one launch, which neither waits for `stream` nor
/// depends on what the ends are: it can be captured in a graph and replayed with other ends.
/// Throws InvalidArgument (before y is touched), Unsupported, CudaError.
QN_API void grouped_matmul_4bit(const GroupedMatmulArgs& args, Workspace workspace, Stream stream);

/// As `matmul_4bit_plan`: `prefers_dense` says that `matmul_4bit_plan`, asked for each group, would
/// advise so for some of them. On a CPU it reads the ends; on CUDA, where it cannot, it is false.
QN_API MatmulPlan grouped_matmul_4bit_plan(const GroupedMatmulArgs& args);

struct GroupedMatmulTransposedArgs {
  MatrixView dy;               ///< [M, N], the rows of group 0 first
  GroupEnds ends;              ///< [E]
  QuantizedStackView weights;  ///< E times [N, K]
  MutableMatrixView dx;        ///< [M, K] of dy's dtype
};

/// Scratch bytes `grouped_matmul_4bit_transposed` needs for these arguments. Throws as it does.
QN_API int64_t
grouped_matmul_4bit_transposed_workspace_bytes(const GroupedMatmulTransposedArgs& args);

/// dX[rows of e] = dY[rows of e] * W[e], from the same storage: the gradient of
/// `grouped_matmul_4bit` with respect to X. Same guarantees.
QN_API void grouped_matmul_4bit_transposed(const GroupedMatmulTransposedArgs& args,
                                           Workspace workspace, Stream stream);

/// As `grouped_matmul_4bit_plan`.
QN_API MatmulPlan grouped_matmul_4bit_transposed_plan(const GroupedMatmulTransposedArgs& args);

}  // namespace qlora_native
