// The three float formats from their definition, in fp64: independent of the library's conversions.
#pragma once

#include <cstdint>
#include <vector>

#include "qlora_native/dtype.h"

namespace qlora_native::testing {

inline constexpr DType kAllDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

/// The nearest value of the format, ties to even; overflow gives an infinity.
double round_to(DType dtype, double x);

/// Half the distance between neighbours around 1: the largest relative rounding error.
double unit_roundoff(DType dtype);

/// The bits of round_to(dtype, x), in the low 16 or 32. Every NaN gives the quiet one without
/// payload.
uint32_t to_bits(DType dtype, double x);
double from_bits(DType dtype, uint32_t bits);

/// Arrays as the library sees them.
std::vector<uint8_t> to_bytes(DType dtype, const std::vector<double>& values);
std::vector<double> from_bytes(DType dtype, const std::vector<uint8_t>& bytes);

}  // namespace qlora_native::testing
