#include "qlora_native/matmul.h"

#include "dispatch.h"
#include "validate.h"

namespace qlora_native {
namespace {

bool is_empty(const MutableMatrixView& out) { return out.rows == 0 || out.cols == 0; }

template <class Args>
bool prefers_dense(const Args& args, const MutableMatrixView& out) {
  validate(args);
  using Traits = OpTraits<Args>;
  if (is_empty(out) || forced_kernel_name(Traits::kOp, Traits::device(args).type)) return false;
  return select_kernel(args).dense_is_faster;
}

}  // namespace

int64_t matmul_4bit_workspace_bytes(const MatmulArgs& args) {
  validate(args);
  return is_empty(args.y) ? 0 : kernel_workspace_bytes(args);
}

void matmul_4bit(const MatmulArgs& args, Workspace workspace, Stream stream) {
  validate(args);
  if (is_empty(args.y)) return;
  run_kernel(args, workspace, stream);
}

bool matmul_4bit_prefers_dense(const MatmulArgs& args) { return prefers_dense(args, args.y); }

int64_t matmul_4bit_transposed_workspace_bytes(const MatmulTransposedArgs& args) {
  validate(args);
  return is_empty(args.dx) ? 0 : kernel_workspace_bytes(args);
}

void matmul_4bit_transposed(const MatmulTransposedArgs& args, Workspace workspace, Stream stream) {
  validate(args);
  if (is_empty(args.dx)) return;
  run_kernel(args, workspace, stream);
}

bool matmul_4bit_transposed_prefers_dense(const MatmulTransposedArgs& args) {
  return prefers_dense(args, args.dx);
}

}  // namespace qlora_native
