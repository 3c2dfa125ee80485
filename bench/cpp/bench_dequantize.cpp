// NF4 with double quantization back to 16- or 32-bit weights.
#include "runner.h"
#include "verify.h"

int main(int argc, char** argv) {
  const bench::Operation operations[] = {
      {"dequantize", qlora_native::Op::kDequantize4bit, false,
       [](bench::Problem& problem, int64_t) { return problem.dequantize(); },
       [](const bench::Problem& problem, int64_t) { return bench::check_dequantized(problem); }}};
  return bench::run(argc, argv, operations);
}
