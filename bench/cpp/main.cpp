// qn_bench: quantize, dequantize and both products on every device, against the machine's own copy
// rate. Options are Google Benchmark's, for example
//     qn_bench --benchmark_filter='cpu/matmul/4096x4096' --benchmark_out=bench.json
#include <benchmark/benchmark.h>

#include <array>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"
#include "problem.h"
#include "verify.h"

namespace {

using qn_bench::Machine;
using qn_bench::Problem;
using qn_bench::Shape;

constexpr std::array kShapes = {Shape{4096, 4096}, Shape{14336, 4096}, Shape{4096, 14336},
                                Shape{28672, 8192}};
constexpr std::array<int64_t, 5> kRows = {1, 4, 16, 64, 512};
constexpr double kGiga = 1e9;

/// A machine with its copy rate and the problem in memory: only one, as the largest take gigabytes.
struct Bench {
  explicit Bench(std::unique_ptr<Machine> on) : machine(std::move(on)) {}

  std::unique_ptr<Machine> machine;
  std::unique_ptr<Problem> problem;
  double copy_rate = 0;

  Problem& problem_of(Shape shape) {
    if (problem == nullptr || !(problem->shape() == shape)) {
      problem.reset();
      problem = std::make_unique<Problem>(*machine, shape);
    }
    if (copy_rate == 0) copy_rate = machine->measure_copy_rate();
    return *problem;
  }
};

struct Operation {
  const char* name;
  bool has_rows;
  Problem::Work (*prepare)(Problem&, int64_t m);
  std::string (*check)(const Problem&, int64_t m);
};

constexpr Operation kOperations[] = {
    {"quantize", false, [](Problem& p, int64_t) { return p.quantize(); },
     [](const Problem& p, int64_t) { return qn_bench::check_quantized(p); }},
    {"dequantize", false, [](Problem& p, int64_t) { return p.dequantize(); },
     [](const Problem& p, int64_t) { return qn_bench::check_dequantized(p); }},
    {"matmul", true, [](Problem& p, int64_t m) { return p.matmul(m); }, qn_bench::check_matmul},
    {"matmul_transposed", true, [](Problem& p, int64_t m) { return p.matmul_transposed(m); },
     qn_bench::check_matmul_transposed},
};

void measure(benchmark::State& state, const std::string& name, Bench& bench,
             const Operation& operation, Shape shape, int64_t m) {
  Problem& problem = bench.problem_of(shape);
  const Problem::Work work = operation.prepare(problem, m);
  const auto replay = bench.machine->replay(work.calls);
  replay();
  // Google Benchmark calls this function several times while it looks for a number of iterations.
  static std::map<std::string, std::string> checked;
  const auto [entry, is_new] = checked.try_emplace(name);
  if (is_new) entry->second = operation.check(problem, m);
  if (!entry->second.empty()) {
    state.SkipWithError(("wrong result: " + entry->second).c_str());
    return;
  }
  const auto calls = static_cast<double>(work.calls.size());
  double seconds = 0;
  for (auto _ : state) {
    const double per_call = replay() / calls;
    state.SetIterationTime(per_call);
    seconds += per_call;
  }
  const double mean = seconds / static_cast<double>(state.iterations());
  const double rate = static_cast<double>(work.bytes_per_call) / mean;
  state.counters["GB/s"] = rate / kGiga;
  state.counters["copy_GB/s"] = bench.copy_rate / kGiga;
  state.counters["of_copy"] = rate / bench.copy_rate;
  if (work.flops_per_call > 0) {
    state.counters["GFLOP/s"] = static_cast<double>(work.flops_per_call) / mean / kGiga;
  }
}

void add(Bench& bench, const Operation& operation, Shape shape, int64_t m) {
  std::string name = qlora_native::name(bench.machine->device().type);
  name += std::string("/") + operation.name + "/" + qn_bench::to_string(shape);
  if (operation.has_rows) name += "/M=" + std::to_string(m);
  benchmark::RegisterBenchmark(name.c_str(),
                               [&bench, &operation, name, shape, m](benchmark::State& state) {
                                 try {
                                   measure(state, name, bench, operation, shape, m);
                                 } catch (const std::exception& error) {
                                   state.SkipWithError(error.what());
                                 }
                               })
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  std::vector<Bench> benches;
  benches.emplace_back(qn_bench::make_cpu_machine());
  if (auto cuda = qn_bench::make_cuda_machine()) benches.emplace_back(std::move(cuda));
  for (Bench& bench : benches) {
    const std::string type = qlora_native::name(bench.machine->device().type);
    benchmark::AddCustomContext(type, bench.machine->name());
    for (const Shape shape : kShapes) {
      for (const Operation& operation : kOperations) {
        if (!operation.has_rows) add(bench, operation, shape, 1);
        for (const int64_t m : kRows) {
          if (operation.has_rows) add(bench, operation, shape, m);
        }
      }
    }
  }
  if (benches.size() == 1) {
    const std::string reason = qlora_native::cuda_unavailable_reason();
    benchmark::AddCustomContext("cuda", "not measured: " + reason);
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
