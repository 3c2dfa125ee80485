// The table on the console, and the records that it is made of.
#pragma once

#include <benchmark/benchmark.h>

#include <iosfwd>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "case.h"

namespace bench {

/// What the run of a case leaves for the reporter, beside its counters.
struct Outcome {
  Record record;        ///< its facts, and what followed from `Timed`
  bool failed = false;  ///< other than by a kernel that does not take the case
};

// Counters, which are in Google Benchmark's own JSON too (--benchmark_out).
inline constexpr char kMedianUs[] = "median_us";
inline constexpr char kFirstQuartileUs[] = "first_quartile_us";
inline constexpr char kThirdQuartileUs[] = "third_quartile_us";
inline constexpr char kRounds[] = "rounds";

/// The figures that follow from a median.
Record figures(const Timed& timed, double median_us, const std::string& ceiling);

class TableReporter : public benchmark::BenchmarkReporter {
 public:
  /// Reads `plan` and `outcomes`, one for each case, while cases are run; writes to `out`.
  /// `skips_unsupported`: cases that a kernel does not take have no line.
  TableReporter(const Plan& plan, std::span<const Outcome> outcomes, bool skips_unsupported,
                std::ostream& out);

  bool ReportContext(const Context& context) override;
  void ReportRuns(const std::vector<Run>& runs) override;
  void Finalize() override;

  /// Of everything that was measured or failed, in order.
  const std::vector<Record>& records() const { return records_; }
  int measured() const { return measured_; }

 private:
  void report(const Run& run);
  void print_heading(const std::string& heading);
  void print_line(const Record& record, const std::string& error);

  const Plan& plan_;
  std::span<const Outcome> outcomes_;
  bool skips_unsupported_;
  std::ostream& out_;
  std::map<std::string, size_t> case_of_name_;
  std::string heading_;
  std::vector<Record> records_;
  std::map<std::string, int> declined_;  ///< "kernel: why not" to the number of cases
  int measured_ = 0;
};

}  // namespace bench
