// One program per operation family: registers its cases with Google Benchmark and runs them.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "problem.h"
#include "qlora_native/kernels.h"

namespace bench {

struct Operation {
  const char* name;
  qlora_native::Op op;
  /// Whether there are activations, whose rows are m.
  bool has_rows;
  Work (*prepare)(Problem& problem, int64_t m);
  /// "" or what is wrong with the output of the work that ran last.
  std::string (*check)(const Problem& problem, int64_t m);
};

/// The program: returns its exit status, 1 also when a result was wrong.
int run(int argc, char** argv, std::span<const Operation> operations);

}  // namespace bench
