#include "qlora_native/quantize.h"

#include "dispatch.h"
#include "validate.h"

namespace qlora_native {

int64_t quantize_4bit_workspace_bytes(const QuantizeArgs& args) {
  validate(args);
  return args.output.numel() == 0 ? 0 : kernel_workspace_bytes(args);
}

void quantize_4bit(const QuantizeArgs& args, Workspace workspace, Stream stream) {
  validate(args);
  if (args.output.numel() == 0) return;
  run_kernel(args, workspace, stream);
}

}  // namespace qlora_native
