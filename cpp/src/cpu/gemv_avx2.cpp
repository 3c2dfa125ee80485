#include "cpu/gemv.h"
#include "cpu/simd_avx2.h"

namespace qlora_native::cpu {

void gemv_avx2(const MatmulArgs& args, Workspace workspace) { gemv<Avx2>(args, workspace); }

void gemv_transposed_avx2(const MatmulTransposedArgs& args, Workspace workspace) {
  gemv_transposed<Avx2>(args, workspace);
}

}  // namespace qlora_native::cpu
