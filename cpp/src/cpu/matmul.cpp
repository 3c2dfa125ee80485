// What the vector kernels of both products need to be told about a problem.
#include "cpu/kernels.h"
#include "qlora_native/error.h"

namespace qlora_native::cpu {

bool rows_hold_whole_blocks(const QuantizedView& weight, std::string* why_not) {
  if (weight.cols % weight.block_size == 0) return true;
  *why_not = "K = " + std::to_string(weight.cols) + " is not a multiple of block_size " +
             std::to_string(weight.block_size);
  return false;
}

int64_t matmul_workspace_bytes(const MatmulArgs& args) {
  return args.x.rows * args.x.cols * int64_t{sizeof(float)};
}

int64_t matmul_transposed_workspace_bytes(const MatmulTransposedArgs& args) {
  return args.dy.rows * args.dy.cols * int64_t{sizeof(float)};
}

void refuse_workspace(const char* kernel, int64_t size_bytes) {
  throw InvalidArgument(std::string(kernel) + ": the workspace of " + std::to_string(size_bytes) +
                        " bytes is too small for the number of CPU threads, which has changed");
}

}  // namespace qlora_native::cpu
