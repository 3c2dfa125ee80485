// dX[M,K] = dY[M,N] * W[N,K] on Hopper's tensor cores: sm90a/kernel.cuh.
#include <cstdint>
#include <string>

#include "gemm/sm90a/kernel.cuh"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

sm90a::Operands operands_of(const MatmulTransposedArgs& args) {
  static constexpr VectorView kNoBias{};
  return {args.dy, args.weight, kNoBias, args.dx};
}

}  // namespace

bool supports_gemm_transposed_sm90a(const MatmulTransposedArgs& args, std::string* why_not) {
  return sm90a::supports(args.dy, args.weight, args.dx.cols, why_not);
}

bool dense_beats_gemm_transposed_sm90a(const MatmulTransposedArgs& args) {
  return !gemm_transposed_sm90a_beats_dense(args.dy.rows);
}

int64_t gemm_transposed_sm90a_workspace_bytes(const MatmulTransposedArgs& args) {
  return sm90a::plan_of(operands_of(args)).workspace_bytes();
}

void gemm_transposed_sm90a(const MatmulTransposedArgs& args, Workspace workspace, Stream stream) {
  sm90a::run<true>("matmul_4bit_transposed gemm_sm90a", operands_of(args), workspace, stream);
}

}  // namespace qlora_native::cuda
