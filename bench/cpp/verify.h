// Naive checks of the outputs on a sample, from the definitions in the public headers and fp64.
#pragma once

#include <cstdint>
#include <string>

#include "problem.h"

namespace bench {

/// Each returns "" or what is wrong. The work in question has run.
std::string check_quantized(const Problem& problem);
std::string check_dequantized(const Problem& problem);
std::string check_matmul(const Problem& problem, int64_t m);
std::string check_matmul_transposed(const Problem& problem, int64_t m);
// In verify_lora.cpp.
std::string check_lora_forward(const Problem& problem, int64_t m, int64_t rank);
std::string check_lora_backward(const Problem& problem, int64_t m, int64_t rank);

}  // namespace bench
