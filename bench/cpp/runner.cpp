#include "runner.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <stdexcept>

#include "qlora_native/error.h"
#include "table_reporter.h"

namespace bench {
namespace {

namespace qn = qlora_native;

/// So many samples a case has at least, however long they take.
constexpr size_t kLeastRounds = 5;

/// "kernel: why not" of the library's report in a line: what stands after the kernel's name.
std::string reason(const qn::Unsupported& error) {
  const std::string message = error.what();
  const size_t line = message.find('\n');
  if (line == std::string::npos) return message;
  const size_t colon = message.find(": ", line);
  return message.substr(colon == std::string::npos ? line + 1 : colon + 2);
}

class Runner {
 public:
  explicit Runner(const Plan& plan) : plan_(plan), outcomes_(plan.cases.size()) {
    for (size_t i = 0; i < plan.cases.size(); ++i) outcomes_[i].record = plan.cases[i].facts;
  }

  std::span<const Outcome> outcomes() const { return outcomes_; }

  void run_case(benchmark::State& state, size_t index) {
    try {
      // Google Benchmark comes here several times while it looks for a number of iterations.
      if (prepared_ != index) prepare(index);
      measure(state, index);
    } catch (const qn::Unsupported& error) {
      state.SkipWithError(reason(error).c_str());
    } catch (const std::exception& error) {
      outcomes_[index].failed = true;
      state.SkipWithError(error.what());
    }
  }

 private:
  void prepare(size_t index) {
    prepared_.reset();
    timed_ = {};
    timed_ = plan_.cases[index].prepare();
    outcomes_[index].record.merge(timed_.facts);
    prepared_ = index;
  }

  void measure(benchmark::State& state, size_t index) {
    std::vector<double> samples;
    const auto sample = [&] {
      const double seconds = timed_.replay();
      samples.push_back(1e6 * seconds / static_cast<double>(timed_.calls));
      return seconds;
    };
    while (state.KeepRunningBatch(timed_.calls)) state.SetIterationTime(sample());
    while (samples.size() < kLeastRounds) sample();
    std::sort(samples.begin(), samples.end());
    const double median = samples[samples.size() / 2];
    state.counters[kFirstQuartileUs] = samples[samples.size() / 4];
    state.counters[kMedianUs] = median;
    state.counters[kThirdQuartileUs] = samples[samples.size() * 3 / 4];
    state.counters[kRounds] = static_cast<double>(samples.size());
    outcomes_[index].record.merge(figures(timed_, median, plan_.ceiling));
  }

  const Plan& plan_;
  std::vector<Outcome> outcomes_;
  std::optional<size_t> prepared_;
  Timed timed_;  ///< of the prepared case: only one, as the largest take gigabytes
};

}  // namespace

void initialize_google_benchmark(std::vector<std::string> options) {
  std::vector<char*> arguments = {const_cast<char*>("qn_bench")};
  for (std::string& option : options) arguments.push_back(option.data());
  int count = static_cast<int>(arguments.size());
  arguments.push_back(nullptr);
  benchmark::Initialize(&count, arguments.data());
  if (count > 1) {
    throw std::invalid_argument(std::string("Google Benchmark does not know ") + arguments[1]);
  }
}

RunResult run_plan(const Plan& plan, const RunOptions& options, std::ostream& out) {
  benchmark::ClearRegisteredBenchmarks();
  Runner runner(plan);
  for (size_t i = 0; i < plan.cases.size(); ++i) {
    benchmark::RegisterBenchmark(
        plan.cases[i].name.c_str(),
        [&runner, i](benchmark::State& state) { runner.run_case(state, i); })
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond)
        ->MinTime(options.min_seconds);
  }
  TableReporter table(plan, runner.outcomes(), options.skips_unsupported, out);
  benchmark::RunSpecifiedBenchmarks(&table);
  benchmark::ClearRegisteredBenchmarks();
  const auto outcomes = runner.outcomes();
  return {.records = table.records(),
          .measured = table.measured(),
          .failed = std::any_of(outcomes.begin(), outcomes.end(),
                                [](const Outcome& outcome) { return outcome.failed; })};
}

}  // namespace bench
