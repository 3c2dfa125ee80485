// Y[M,N] = X[M,K] * W[N,K]^T + bias on Hopper's tensor cores: sm90a/kernel.cuh.
#include <cstdint>
#include <string>

#include "gemm/sm90a/kernel.cuh"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

sm90a::Operands operands_of(const MatmulArgs& args) {
  return {args.x, args.weight, args.bias, args.y};
}

}  // namespace

bool is_gemm_sm90a_usable(Device device, std::string* why_not) {
  return is_usable(device, why_not) && is_hopper(device, why_not) &&
         has_hopper_resources(device, sm90a::kMaxSharedBytes, why_not);
}

bool supports_gemm_sm90a(const MatmulArgs& args, std::string* why_not) {
  return sm90a::supports(args.x, args.weight, args.y.cols, why_not);
}

bool prefers_gemm_sm90a(const MatmulArgs& args) {
  return gemm_sm90a_is_preferred(args.x.rows, args.x.cols);
}

bool dense_beats_gemm_sm90a(const MatmulArgs& args) { return !gemm_sm90a_beats_dense(args.x.rows); }

int64_t gemm_sm90a_workspace_bytes(const MatmulArgs& args) {
  return sm90a::plan_of(operands_of(args)).workspace_bytes();
}

void gemm_sm90a(const MatmulArgs& args, Workspace workspace, Stream stream) {
  sm90a::run<false>("matmul_4bit gemm_sm90a", operands_of(args), workspace, stream);
}

}  // namespace qlora_native::cuda
