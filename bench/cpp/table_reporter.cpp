#include "table_reporter.h"

#include <cstdlib>
#include <ostream>

#include "columns.h"

namespace bench {
namespace {

constexpr double kTera = 1e12;

/// Why a run has no figures, or "". Google Benchmark renamed these members in 1.8.
template <class Run>
std::string failure(const Run& run) {
  if constexpr (requires { run.error_occurred; }) {
    return run.error_occurred ? run.error_message : "";
  } else {
    return static_cast<bool>(run.skipped) ? run.skip_message : "";
  }
}

/// `text` in a column; text that is too long is left as it is.
std::string padded(const std::string& text, int width) {
  const auto wanted = static_cast<size_t>(std::abs(width));
  const std::string space(text.size() < wanted ? wanted - text.size() : 0, ' ');
  return width < 0 ? "  " + text + space : space + text;
}

std::string without_trailing_space(std::string line) {
  line.erase(line.find_last_not_of(' ') + 1);
  return line;
}

}  // namespace

Record figures(const Timed& timed, double median_us, const std::string& ceiling) {
  const double seconds = median_us * 1e-6;
  Record record;
  if (timed.bytes > 0) {
    record.set("bytes", static_cast<int64_t>(timed.bytes));
    record.set("tb_per_s", timed.bytes / seconds / kTera);
  }
  if (timed.ceiling > 0) {
    record.set("fraction_of_" + ceiling, timed.bytes / seconds / timed.ceiling);
  }
  if (timed.weight_bytes > 0) {
    record.set("weight_bytes", static_cast<int64_t>(timed.weight_bytes));
    record.set("weight_tb_per_s", timed.weight_bytes / seconds / kTera);
  }
  if (timed.flops > 0) record.set("tflop_per_s", timed.flops / seconds / kTera);
  return record;
}

TableReporter::TableReporter(const Plan& plan, std::span<const Outcome> outcomes,
                             bool skips_unsupported, std::ostream& out)
    : plan_(plan), outcomes_(outcomes), skips_unsupported_(skips_unsupported), out_(out) {
  for (size_t i = 0; i < plan.cases.size(); ++i) case_of_name_[plan.cases[i].name] = i;
}

bool TableReporter::ReportContext(const Context&) { return true; }

void TableReporter::ReportRuns(const std::vector<Run>& runs) {
  for (const Run& run : runs) {
    // Google Benchmark's own medians and deviations of repetitions are of its mean times.
    if (run.aggregate_name.empty()) report(run);
  }
  out_.flush();
}

void TableReporter::report(const Run& run) {
  const size_t index = case_of_name_.at(run.run_name.function_name);
  const Outcome& outcome = outcomes_[index];
  const std::string error = failure(run);
  Record record = outcome.record;
  if (!error.empty() && !outcome.failed && skips_unsupported_) {
    const std::string* kernel = record.find<std::string>("kernel");
    ++declined_[(kernel == nullptr ? "" : *kernel + ": ") + error];
    return;
  }
  if (error.empty()) {
    const auto counter = [&](const char* name) {
      return static_cast<double>(run.counters.at(name));
    };
    record.set("median_us", counter(kMedianUs));
    record.set("quartiles_us",
               std::vector<double>{counter(kFirstQuartileUs), counter(kThirdQuartileUs)});
    record.set("rounds", static_cast<int64_t>(counter(kRounds)));
    ++measured_;
  } else {
    record.set("error", error);
  }
  print_heading(plan_.cases[index].heading);
  print_line(record, error);
  records_.push_back(std::move(record));
}

void TableReporter::print_heading(const std::string& heading) {
  if (heading == heading_) return;
  heading_ = heading;
  std::string titles;
  for (const Column& column : plan_.columns) titles += padded(column.title, column.width);
  out_ << "\n" << heading << "\n" << without_trailing_space(titles) << "\n";
}

void TableReporter::print_line(const Record& record, const std::string& error) {
  std::string line;
  for (const Column& column : plan_.columns) {
    const std::string text = column.text(record);
    if (!error.empty() && text == kNoValue) break;
    line += padded(text, column.width);
  }
  if (!error.empty()) {
    const std::string* kernel = record.find<std::string>("kernel");
    line += "  " + (kernel == nullptr ? "" : *kernel + ": ") + error;
  }
  out_ << without_trailing_space(line) << "\n";
}

void TableReporter::Finalize() {
  for (const auto& [reason, count] : declined_) {
    if (&reason == &declined_.begin()->first) out_ << "\nNot measured:\n";
    out_ << "  " << reason << (count > 1 ? " (" + std::to_string(count) + " cases)" : "") << "\n";
  }
}

}  // namespace bench
