#include "qlora_native/matmul.h"

#include "dispatch.h"
#include "matmul_plan.h"
#include "validate.h"

namespace qlora_native {

int64_t matmul_4bit_workspace_bytes(const MatmulArgs& args) {
  return matmul_4bit_plan(args).workspace_bytes;
}

void matmul_4bit(const MatmulArgs& args, Workspace workspace, Stream stream) {
  validate(args);
  if (is_empty(args.y)) return;
  run_kernel(args, workspace, stream);
}

MatmulPlan matmul_4bit_plan(const MatmulArgs& args) { return make_plan(args, args.y); }

int64_t matmul_4bit_transposed_workspace_bytes(const MatmulTransposedArgs& args) {
  return matmul_4bit_transposed_plan(args).workspace_bytes;
}

void matmul_4bit_transposed(const MatmulTransposedArgs& args, Workspace workspace, Stream stream) {
  validate(args);
  if (is_empty(args.dx)) return;
  run_kernel(args, workspace, stream);
}

MatmulPlan matmul_4bit_transposed_plan(const MatmulTransposedArgs& args) {
  return make_plan(args, args.dx);
}

}  // namespace qlora_native
