#include "qlora_native/dequantize.h"

#include "dispatch.h"
#include "validate.h"

namespace qlora_native {

void dequantize_4bit(const DequantizeArgs& args, Stream stream) {
  validate(args);
  if (args.weight.numel() == 0) return;
  run_kernel(args, Workspace{}, stream);
}

}  // namespace qlora_native
