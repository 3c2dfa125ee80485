// Times the cases of a plan with Google Benchmark.
#pragma once

#include <iosfwd>
#include <string>
#include <vector>

#include "case.h"

namespace bench {

struct RunOptions {
  double min_seconds = 0.5;        ///< of each case
  bool skips_unsupported = false;  ///< cases that a kernel does not take are told of at the end
};

struct RunResult {
  std::vector<Record> records;  ///< of what was measured or failed, in order
  int measured = 0;
  bool failed = false;  ///< a case went wrong, other than by a kernel that does not take it
};

/// Hands over options that begin with "--benchmark_". Throws std::invalid_argument when there is one
/// that Google Benchmark does not know.
void initialize_google_benchmark(std::vector<std::string> options);

/// Runs the cases one after the other, each verified and then timed; prints the table to `out` as it
/// grows.
RunResult run_plan(const Plan& plan, const RunOptions& options, std::ostream& out);

}  // namespace bench
