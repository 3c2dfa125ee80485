// What the processor and the operating system let a kernel use.
#pragma once

#include <cstdint>
#include <string>

namespace qlora_native::cpu {

struct CpuFeatures {
  bool avx2 = false;    ///< AVX2, FMA and F16C
  bool avx512 = false;  ///< AVX-512 F, BW, VL and DQ, and everything in `avx2`
  bool avx512_vbmi = false;
  bool avx512_bf16 = false;
  bool amx_bf16 = false;  ///< and the system has let this process use the tiles
  std::string brand;      ///< the vendor's name of the processor
};

/// Read once. All false on other processors than x86-64.
const CpuFeatures& cpu_features();

/// "avx2 avx512 ..."; "" when there is none.
std::string to_string(const CpuFeatures& features);

/// Physical memory in bytes, 0 when the system does not say.
int64_t physical_memory_bytes();

}  // namespace qlora_native::cpu
