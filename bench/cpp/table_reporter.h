// The console's table: a line per case, in the units of this library's floors.
#pragma once

#include <benchmark/benchmark.h>

#include <vector>

namespace bench {

// Names of the counters, which are those of Google Benchmark's JSON too.
inline constexpr char kMedianUs[] = "median_us";
inline constexpr char kBytes[] = "bytes";
inline constexpr char kTbPerS[] = "TB/s";
inline constexpr char kCopyTbPerS[] = "copy_TB/s";
inline constexpr char kOfCopy[] = "of_copy";
inline constexpr char kWeightTbPerS[] = "weight_TB/s";
inline constexpr char kTflopPerS[] = "TFLOP/s";

class TableReporter : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context& context) override;
  void ReportRuns(const std::vector<Run>& runs) override;

 private:
  size_t name_width_ = 0;
  double copy_tb_per_s_ = 0;
};

}  // namespace bench
