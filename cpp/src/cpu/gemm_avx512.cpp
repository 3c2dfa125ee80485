#include "cpu/gemm.h"
#include "cpu/simd_avx512.h"

namespace qlora_native::cpu {

void gemm_avx512(const MatmulArgs& args, Workspace workspace) { gemm<Avx512>(args, workspace); }

void gemm_transposed_avx512(const MatmulTransposedArgs& args, Workspace workspace) {
  gemm_transposed<Avx512>(args, workspace);
}

}  // namespace qlora_native::cpu
