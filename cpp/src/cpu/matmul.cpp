// What the vector kernels of both products need to be told about a problem.
#include "cpu/kernels.h"

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

}  // namespace qlora_native::cpu
