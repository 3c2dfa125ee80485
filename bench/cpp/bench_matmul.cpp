// Y = X W^T and dX = dY W over one NF4 weight, by this library's kernels alone.
#include "runner.h"
#include "verify.h"

int main(int argc, char** argv) {
  const bench::Operation operations[] = {
      {"matmul", qlora_native::Op::kMatmul4bit, true,
       [](bench::Problem& problem, int64_t m) { return problem.matmul(m); }, bench::check_matmul},
      {"matmul_transposed", qlora_native::Op::kMatmul4bitTransposed, true,
       [](bench::Problem& problem, int64_t m) { return problem.matmul_transposed(m); },
       bench::check_matmul_transposed}};
  return bench::run(argc, argv, operations);
}
