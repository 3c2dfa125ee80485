#include "cpu/gemm.h"
#include "cpu/simd_avx2.h"

namespace qlora_native::cpu {

void gemm_avx2(const MatmulArgs& args, Workspace workspace) { gemm<Avx2>(args, workspace); }

void gemm_transposed_avx2(const MatmulTransposedArgs& args, Workspace workspace) {
  gemm_transposed<Avx2>(args, workspace);
}

}  // namespace qlora_native::cpu
