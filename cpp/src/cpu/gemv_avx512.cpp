#include "cpu/gemv.h"
#include "cpu/simd_avx512.h"

namespace qlora_native::cpu {

void gemv_avx512(const MatmulArgs& args, Workspace workspace) { gemv<Avx512>(args, workspace); }

void gemv_transposed_avx512(const MatmulTransposedArgs& args, Workspace workspace) {
  gemv_transposed<Avx512>(args, workspace);
}

}  // namespace qlora_native::cpu
