// What the kernels of the CPU backend ask of the processor and of their arguments, and which of them
// is the measured choice.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/cpu_features.h"
#include "cpu/kernels.h"
#include "qlora_native/device.h"
#include "qlora_native/matmul.h"

namespace qlora_native::cpu {

inline bool always_usable(Device, std::string*) { return true; }

#if defined(QN_CPU_X86)
inline bool usable_if(bool present, const char* features, std::string* why_not) {
  if (!present) *why_not = std::string("the processor, or the operating system, lacks ") + features;
  return present;
}

// These name all that the kernels' compile flags let the compiler use, see sources.cmake.
inline bool avx2_usable(Device, std::string* why_not) {
  return usable_if(cpu_features().avx2, "AVX2, FMA or F16C", why_not);
}

inline bool avx512_usable(Device, std::string* why_not) {
  return usable_if(cpu_features().avx512, "AVX-512 F, BW, VL or DQ", why_not);
}

#if defined(QN_CPU_AMX)
inline bool amx_usable(Device, std::string* why_not) {
  return usable_if(cpu_features().amx_bf16, "AMX-BF16 or AVX-512 BF16", why_not);
}

inline bool is_bfloat16(DType dtype, std::string* why_not) {
  if (dtype == DType::kBFloat16) return true;
  *why_not = std::string("the activations are ") + name(dtype) + ", not bfloat16";
  return false;
}
inline bool bf16_supports(const MatmulArgs& args, std::string* why_not) {
  return is_bfloat16(args.x.dtype, why_not);
}
inline bool bf16_supports(const MatmulTransposedArgs& args, std::string* why_not) {
  return is_bfloat16(args.dy.dtype, why_not);
}
#endif

/// Rows of X up to which decoding in registers beats decoding to panels, as measured.
inline constexpr int64_t kGemvMaxRows = 12;
#if defined(QN_CPU_AMX)
/// And up to which it beats AMX, which pays for sixteen rows in any case.
inline constexpr int64_t kGemvMaxRowsBesideAmx = 4;

inline bool amx_preferred(const QuantizedView& weight, int64_t rows) {
  std::string why_not;
  return rows > kGemvMaxRowsBesideAmx || !rows_hold_whole_blocks(weight, &why_not);
}
inline bool amx_preferred(const MatmulArgs& args) {
  return amx_preferred(args.weight, args.x.rows);
}
inline bool amx_preferred(const MatmulTransposedArgs& args) {
  return amx_preferred(args.weight, args.dy.rows);
}
#endif

inline bool gemv_supports(const MatmulArgs& args, std::string* why_not) {
  return rows_hold_whole_blocks(args.weight, why_not);
}
inline bool gemv_supports(const MatmulTransposedArgs& args, std::string* why_not) {
  return rows_hold_whole_blocks(args.weight, why_not);
}
inline bool gemv_preferred(const MatmulArgs& args) { return args.x.rows <= kGemvMaxRows; }
inline bool gemv_preferred(const MatmulTransposedArgs& args) {
  return args.dy.rows <= kGemvMaxRows;
}
#endif

}  // namespace qlora_native::cpu
