#include "qlora_native/grouped_matmul.h"

#include "dispatch.h"
#include "matmul_plan.h"
#include "validate.h"

namespace qlora_native {

int64_t grouped_matmul_4bit_workspace_bytes(const GroupedMatmulArgs& args) {
  return grouped_matmul_4bit_plan(args).workspace_bytes;
}

void grouped_matmul_4bit(const GroupedMatmulArgs& args, Workspace workspace, Stream stream) {
  validate(args);
  if (is_empty(args.y)) return;
  run_kernel(args, workspace, stream);
}

MatmulPlan grouped_matmul_4bit_plan(const GroupedMatmulArgs& args) {
  return make_plan(args, args.y);
}

int64_t grouped_matmul_4bit_transposed_workspace_bytes(const GroupedMatmulTransposedArgs& args) {
  return grouped_matmul_4bit_transposed_plan(args).workspace_bytes;
}

void grouped_matmul_4bit_transposed(const GroupedMatmulTransposedArgs& args, Workspace workspace,
                                    Stream stream) {
  validate(args);
  if (is_empty(args.dx)) return;
  run_kernel(args, workspace, stream);
}

MatmulPlan grouped_matmul_4bit_transposed_plan(const GroupedMatmulTransposedArgs& args) {
  return make_plan(args, args.dx);
}

}  // namespace qlora_native
