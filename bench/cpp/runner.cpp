#include "runner.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <exception>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "machine.h"
#include "options.h"
#include "table_reporter.h"

namespace bench {
namespace {

namespace qn = qlora_native;

const std::vector<Shape> kCpuShapes = {{4096, 4096}, {14336, 4096}};
const std::vector<Shape> kCudaShapes = {{4096, 4096}, {14336, 4096}, {4096, 14336}, {28672, 8192}};
constexpr double kTera = 1e12;

struct Case {
  std::string name;
  const Operation* operation;
  Shape shape;
  qn::DType dtype;
  int64_t m;
};

/// A machine with its copy rate and the case in memory: only one, as the largest take gigabytes.
class Bench {
 public:
  Bench(std::unique_ptr<Machine> machine, std::string kernel)
      : machine_(std::move(machine)), kernel_(std::move(kernel)) {}

  Machine& machine() const { return *machine_; }
  qn::DeviceType device() const { return machine_->device().type; }

  void measure(benchmark::State& state, const Case& wanted) {
    // Google Benchmark comes here several times while it looks for a number of iterations.
    if (prepared_ != wanted.name) prepare(wanted);
    const auto calls = static_cast<double>(work_.calls.size());
    std::vector<double> samples;
    while (state.KeepRunningBatch(static_cast<int64_t>(work_.calls.size()))) {
      const double seconds = replay_();
      state.SetIterationTime(seconds);
      samples.push_back(seconds / calls);
    }
    const auto middle = samples.begin() + static_cast<ptrdiff_t>(samples.size() / 2);
    std::nth_element(samples.begin(), middle, samples.end());
    report(state, *middle);
  }

 private:
  void prepare(const Case& wanted) {
    prepared_.clear();
    replay_ = nullptr;
    work_ = {};
    if (copy_rate_ == 0) copy_rate_ = machine_->measure_copy_rate();
    const bool fits = problem_ != nullptr && problem_->shape() == wanted.shape &&
                      problem_->dtype() == wanted.dtype;
    if (!fits) {
      problem_.reset();
      problem_ = std::make_unique<Problem>(*machine_, wanted.shape, wanted.dtype);
    }
    qn::force_kernel(wanted.operation->op, device(), kernel_);
    work_ = wanted.operation->prepare(*problem_, wanted.m);
    replay_ = machine_->replay(work_.calls);
    replay_();
    const std::string wrong = wanted.operation->check(*problem_, wanted.m);
    if (!wrong.empty()) throw std::runtime_error("wrong result: " + wrong);
    prepared_ = wanted.name;
  }

  void report(benchmark::State& state, double seconds) const {
    const auto bytes = static_cast<double>(work_.bytes_per_call);
    state.counters[kMedianUs] = seconds * 1e6;
    state.counters[kBytes] = bytes;
    state.counters[kTbPerS] = bytes / seconds / kTera;
    state.counters[kCopyTbPerS] = copy_rate_ / kTera;
    state.counters[kOfCopy] = bytes / seconds / copy_rate_;
    if (work_.flops_per_call > 0) {
      const auto weight_bytes = static_cast<double>(work_.weight_bytes_per_call);
      state.counters[kWeightTbPerS] = weight_bytes / seconds / kTera;
      state.counters[kTflopPerS] = static_cast<double>(work_.flops_per_call) / seconds / kTera;
    }
    state.SetLabel(work_.kernel + (work_.prefers_dense ? " (dense is preferred)" : ""));
  }

  std::unique_ptr<Machine> machine_;
  std::string kernel_;
  double copy_rate_ = 0;
  std::unique_ptr<Problem> problem_;
  /// Name of the case that the following belong to.
  std::string prepared_;
  Work work_;
  std::function<double()> replay_;
};

bool has_kernel(qn::Op op, qn::DeviceType device, const std::string& name) {
  const std::vector<qn::KernelInfo> kernels = qn::list_kernels();
  return std::any_of(kernels.begin(), kernels.end(), [&](const qn::KernelInfo& kernel) {
    return kernel.op == op && kernel.device == device && kernel.name == name;
  });
}

void add(Bench& bench, Case added, bool& failed) {
  const std::string name = added.name;
  const auto body = [&bench, &failed, added = std::move(added)](benchmark::State& state) {
    try {
      bench.measure(state, added);
    } catch (const qn::Unsupported& error) {
      // A forced kernel need not support every case.
      state.SkipWithError(error.what());
    } catch (const std::exception& error) {
      failed = true;
      state.SkipWithError(error.what());
    }
  };
  benchmark::RegisterBenchmark(name.c_str(), body)->UseManualTime()->Unit(benchmark::kMicrosecond);
}

/// Returns how many cases there are.
int add_all(Bench& bench, const Options& options, std::span<const Operation> operations,
            bool& failed) {
  const bool is_cpu = bench.device() == qn::DeviceType::kCpu;
  const std::vector<Shape>& own_shapes = is_cpu ? kCpuShapes : kCudaShapes;
  int added = 0;
  for (const Shape shape : options.shapes.empty() ? own_shapes : options.shapes) {
    for (const qn::DType dtype : options.dtypes) {
      for (const Operation& operation : operations) {
        const std::string& kernel = options.kernel;
        if (!kernel.empty() && !has_kernel(operation.op, bench.device(), kernel)) continue;
        const std::string name = std::string(qn::name(bench.device())) + "/" + operation.name +
                                 "/" + to_string(shape) + "/" + short_name(dtype);
        const std::vector<int64_t> no_rows = {0};
        for (const int64_t m : operation.has_rows ? options.rows : no_rows) {
          const std::string suffix = operation.has_rows ? "/M=" + std::to_string(m) : "";
          add(bench, {name + suffix, &operation, shape, dtype, m}, failed);
          ++added;
        }
      }
    }
  }
  return added;
}

std::vector<std::unique_ptr<Bench>> make_benches(const Options& options) {
  const auto is_wanted = [&](const char* device) {
    const auto& names = options.devices;
    return names.empty() || std::find(names.begin(), names.end(), device) != names.end();
  };
  std::vector<std::unique_ptr<Bench>> benches;
  if (is_wanted("cpu")) {
    benches.push_back(std::make_unique<Bench>(make_cpu_machine(), options.kernel));
  }
  if (is_wanted("cuda")) {
    if (auto machine = make_cuda_machine()) {
      benches.push_back(std::make_unique<Bench>(std::move(machine), options.kernel));
    } else if (options.devices.empty()) {
      benchmark::AddCustomContext("cuda", "not measured: " + qn::cuda_unavailable_reason());
    } else {
      throw std::invalid_argument("--devices: no CUDA device: " + qn::cuda_unavailable_reason());
    }
  }
  return benches;
}

}  // namespace

int run(int argc, char** argv, std::span<const Operation> operations) {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  const auto has = [&](const char* start) {
    return std::any_of(arguments.begin(), arguments.end(),
                       [&](const std::string& given) { return given.rfind(start, 0) == 0; });
  };
  if (has("--help")) {
    std::cout << argv[0] << " [options]\n" << options_help();
    return 0;
  }
  const bool wants_own_format = has("--benchmark_format");
  bool failed = false;
  try {
    const Options options = parse_options(arguments);
    std::vector<char*> rest = {argv[0]};
    for (std::string& argument : arguments) rest.push_back(argument.data());
    int count = static_cast<int>(rest.size());
    rest.push_back(nullptr);
    benchmark::Initialize(&count, rest.data());
    if (benchmark::ReportUnrecognizedArguments(count, rest.data())) return 1;
    if (options.threads > 0) qn::set_cpu_threads(options.threads);
    const std::vector<std::unique_ptr<Bench>> benches = make_benches(options);
    int added = 0;
    for (const auto& bench : benches) {
      benchmark::AddCustomContext(qn::name(bench->device()), bench->machine().name());
      added += add_all(*bench, options, operations, failed);
    }
    if (added == 0) {
      throw std::invalid_argument("--kernel: no operation here has a kernel '" + options.kernel +
                                  "'");
    }
    TableReporter table;
    benchmark::RunSpecifiedBenchmarks(wants_own_format ? nullptr : &table);
    benchmark::Shutdown();
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << "\n";
    return 1;
  }
  return failed ? 1 : 0;
}

}  // namespace bench
