#include "qlora_native/optimizer.h"

#include "dispatch.h"
#include "validate.h"

namespace qlora_native {

int64_t optimizer_step_workspace_bytes(const OptimizerStepArgs& args) {
  validate(args);
  return args.tensors.empty() ? 0 : kernel_workspace_bytes(args);
}

void optimizer_step(const OptimizerStepArgs& args, Workspace workspace, Stream stream) {
  validate(args);
  if (args.tensors.empty()) return;
  run_kernel(args, workspace, stream);
}

int64_t gradient_norm_workspace_bytes(const GradientNormArgs& args) {
  validate(args);
  return kernel_workspace_bytes(args);
}

void gradient_norm(const GradientNormArgs& args, Workspace workspace, Stream stream) {
  validate(args);
  run_kernel(args, workspace, stream);
}

}  // namespace qlora_native
