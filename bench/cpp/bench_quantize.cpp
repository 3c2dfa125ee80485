// 16- or 32-bit weights to NF4 with double quantization.
#include "runner.h"
#include "verify.h"

int main(int argc, char** argv) {
  const bench::Operation operations[] = {
      {"quantize", qlora_native::Op::kQuantize4bit, false,
       [](bench::Problem& problem, int64_t) { return problem.quantize(); },
       [](const bench::Problem& problem, int64_t) { return bench::check_quantized(problem); }}};
  return bench::run(argc, argv, operations);
}
