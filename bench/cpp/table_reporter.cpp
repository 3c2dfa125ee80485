#include "table_reporter.h"

#include <cstdio>
#include <ostream>
#include <string>

namespace bench {
namespace {

/// Why a run has no figures, or "". Google Benchmark renamed these members in 1.8.
template <class Run>
std::string failure(const Run& run) {
  if constexpr (requires { run.error_occurred; }) {
    return run.error_occurred ? run.error_message : "";
  } else {
    return static_cast<bool>(run.skipped) ? run.skip_message : "";
  }
}

/// A counter in `width` characters, or a dash where the run has none.
std::string cell(const benchmark::UserCounters& counters, const char* name, const char* format,
                 double scale = 1) {
  const auto found = counters.find(name);
  char text[32] = "-";
  if (found != counters.end()) {
    std::snprintf(text, sizeof text, format, static_cast<double>(found->second) * scale);
  }
  return text;
}

}  // namespace

bool TableReporter::ReportContext(const Context& context) {
  PrintBasicContext(&GetErrorStream(), context);
  name_width_ = context.name_field_width;
  char head[160];
  std::snprintf(head, sizeof head, " %10s %10s %8s %8s %12s %9s  %s\n", "median us", "MB", "TB/s",
                "of copy", "weight TB/s", "TFLOP/s", "kernel");
  GetOutputStream() << "case" << std::string(name_width_ - 4, ' ') << head;
  return true;
}

void TableReporter::ReportRuns(const std::vector<Run>& runs) {
  std::ostream& out = GetOutputStream();
  for (const Run& run : runs) {
    char line[160];
    const auto& counters = run.counters;
    const auto copy = counters.find(kCopyTbPerS);
    // Once a device; the spread of repetitions is no rate.
    if (run.aggregate_name.empty() && copy != counters.end() &&
        copy->second.value != copy_tb_per_s_) {
      copy_tb_per_s_ = copy->second.value;
      std::snprintf(line, sizeof line, "# copy, read plus written: %.4f TB/s\n", copy_tb_per_s_);
      out << line;
    }
    std::string name = run.run_name.function_name;
    if (!run.aggregate_name.empty()) name += "_" + run.aggregate_name;
    out << name << std::string(name.size() < name_width_ ? name_width_ - name.size() : 0, ' ');
    if (const std::string why = failure(run); !why.empty()) {
      out << "  " << why << "\n";
      continue;
    }
    std::snprintf(
        line, sizeof line, " %10s %10s %8s %8s %12s %9s  ",
        cell(counters, kMedianUs, "%.2f").c_str(), cell(counters, kBytes, "%.2f", 1e-6).c_str(),
        cell(counters, kTbPerS, "%.4f").c_str(), cell(counters, kOfCopy, "%.1f%%", 100).c_str(),
        cell(counters, kWeightTbPerS, "%.4f").c_str(), cell(counters, kTflopPerS, "%.3f").c_str());
    out << line << run.report_label << "\n";
  }
  out.flush();
}

}  // namespace bench
