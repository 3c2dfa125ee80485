#include "weight_cases.h"

#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>

#include "columns.h"
#include "kernel_names.h"
#include "problem.h"
#include "verify.h"

namespace bench {
namespace {

namespace qn = qlora_native;

/// Of a case; 0 where there is none.
struct Sizes {
  int64_t m = 0;
  int64_t rank = 0;
};

struct Operation {
  const char* name;
  const char* formula;
  Work (*prepare)(Problem& problem, Sizes sizes);
  std::string (*check)(const Problem& problem, Sizes sizes);
  /// None of what is made of several operations, whose kernels are the library's choice.
  std::optional<qn::Op> op = std::nullopt;
};

constexpr Operation kQuantize = {
    "quantize", "weights to 4 bits", [](Problem& problem, Sizes) { return problem.quantize(); },
    [](const Problem& problem, Sizes) { return check_quantized(problem); }, qn::Op::kQuantize4bit};
constexpr Operation kDequantize = {
    "dequantize", "4 bits to weights", [](Problem& problem, Sizes) { return problem.dequantize(); },
    [](const Problem& problem, Sizes) { return check_dequantized(problem); },
    qn::Op::kDequantize4bit};
constexpr Operation kMatmul = {
    "matmul", "Y[M, N] = X[M, K] W[N, K]^T",
    [](Problem& problem, Sizes sizes) { return problem.matmul(sizes.m); },
    [](const Problem& problem, Sizes sizes) { return check_matmul(problem, sizes.m); },
    qn::Op::kMatmul4bit};
constexpr Operation kMatmulTransposed = {
    "matmul_transposed", "dX[M, K] = dY[M, N] W[N, K]",
    [](Problem& problem, Sizes sizes) { return problem.matmul_transposed(sizes.m); },
    [](const Problem& problem, Sizes sizes) { return check_matmul_transposed(problem, sizes.m); },
    qn::Op::kMatmul4bitTransposed};
constexpr Operation kLoraForward = {
    "lora_forward", "Y = X W^T + s (X A^T) B^T",
    [](Problem& problem, Sizes sizes) { return problem.lora_forward(sizes.m, sizes.rank); },
    [](const Problem& problem, Sizes sizes) {
      return check_lora_forward(problem, sizes.m, sizes.rank);
    }};
constexpr Operation kLoraBackward = {
    "lora_backward", "dX, dA and dB of Y = X W^T + s (X A^T) B^T",
    [](Problem& problem, Sizes sizes) { return problem.lora_backward(sizes.m, sizes.rank); },
    [](const Problem& problem, Sizes sizes) {
      return check_lora_backward(problem, sizes.m, sizes.rank);
    }};

struct WeightCase {
  const Operation* operation;
  Shape shape;
  qn::DType dtype;
  WeightFormat format;
  Sizes sizes;
  std::string kernel;  ///< "": the library's choice
};

/// The machine, and the problem that several cases have in common: only one, as the largest take
/// gigabytes.
class Bench {
 public:
  Bench(Machine& machine, double copy_rate) : machine_(machine), copy_rate_(copy_rate) {}
  ~Bench() { unforce_kernels(machine_.device().type); }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  Machine& machine() const { return machine_; }
  double copy_rate() const { return copy_rate_; }

  Problem& problem_of(const WeightCase& wanted) {
    const bool fits = problem_ != nullptr && problem_->shape() == wanted.shape &&
                      problem_->dtype() == wanted.dtype && problem_->format() == wanted.format;
    if (!fits) {
      problem_.reset();
      problem_ = std::make_unique<Problem>(machine_, wanted.shape, wanted.dtype, wanted.format);
    }
    return *problem_;
  }

 private:
  Machine& machine_;
  double copy_rate_;
  std::unique_ptr<Problem> problem_;
};

Timed prepare(Bench& bench, const WeightCase& wanted) {
  const Operation& operation = *wanted.operation;
  const qn::DeviceType device = bench.machine().device().type;
  Problem& problem = bench.problem_of(wanted);
  if (operation.op) qn::force_kernel(*operation.op, device, wanted.kernel);
  const auto work = std::make_shared<const Work>(operation.prepare(problem, wanted.sizes));
  const std::function<double()> replay = bench.machine().replay(work->calls);
  replay();
  const std::string wrong = operation.check(problem, wanted.sizes);
  if (!wrong.empty()) throw std::runtime_error("wrong result: " + wrong);
  Timed timed{.replay = [work, replay] { return replay(); },
              .calls = std::ssize(work->calls),
              .bytes = static_cast<double>(work->bytes_per_call),
              .ceiling = bench.copy_rate()};
  if (operation.op) timed.facts.set("kernel", work->kernel);
  if (!wanted.kernel.empty()) timed.facts.set("is_choice", work->kernel == work->automatic_kernel);
  if (work->flops_per_call > 0) {
    timed.weight_bytes = static_cast<double>(work->weight_bytes_per_call);
    timed.flops = static_cast<double>(work->flops_per_call);
    if (operation.op) {
      timed.facts.set("prefers_dense",
                      work->prefers_dense && work->kernel == work->automatic_kernel);
    }
  }
  return timed;
}

Case case_of(const std::shared_ptr<Bench>& bench, const WeightCase& wanted) {
  const WeightFormat& format = wanted.format;
  const std::string quantization = std::string(qn::name(format.quant_type)) + "/" +
                                   std::to_string(format.block_size) +
                                   (format.double_quant ? "/double" : "/fp32");
  Case made;
  made.name = std::string(wanted.operation->name) + "/" + to_string(wanted.shape) + "/" +
              short_name(wanted.dtype) + "/" + quantization;
  if (wanted.sizes.m > 0) made.name += "/M=" + std::to_string(wanted.sizes.m);
  if (wanted.sizes.rank > 0) made.name += "/r=" + std::to_string(wanted.sizes.rank);
  if (!wanted.kernel.empty()) made.name += "/" + wanted.kernel;
  made.heading = std::string(wanted.operation->formula) + ": " + short_name(wanted.dtype) + ", " +
                 qn::name(format.quant_type) + " in blocks of " +
                 std::to_string(format.block_size) + ", scales in " +
                 (format.double_quant ? "8 bits" : "fp32");
  made.facts = {{"op", wanted.operation->name},
                {"shape", std::vector<int64_t>{wanted.shape.n, wanted.shape.k}},
                {"dtype", short_name(wanted.dtype)},
                {"quant_type", qn::name(format.quant_type)},
                {"block_size", format.block_size},
                {"double_quant", format.double_quant}};
  if (wanted.sizes.m > 0) made.facts.set("m", wanted.sizes.m);
  if (wanted.sizes.rank > 0) made.facts.set("rank", wanted.sizes.rank);
  if (!wanted.kernel.empty()) made.facts.set("kernel", wanted.kernel);
  made.prepare = [bench, wanted] { return prepare(*bench, wanted); };
  return made;
}

struct Setting {
  qn::DType dtype;
  WeightFormat format;
};

std::vector<Setting> settings_of(const Options& options) {
  const std::vector<qn::DType> dtypes =
      options.dtypes.empty() ? std::vector{qn::DType::kBFloat16} : options.dtypes;
  std::vector<Setting> settings;
  for (const qn::DType dtype : dtypes) {
    for (const qn::QuantType type : options.quant_types) {
      for (const int64_t block_size : options.block_sizes) {
        for (const bool double_quant : options.double_quants) {
          settings.push_back({dtype, {type, block_size, double_quant}});
        }
      }
    }
  }
  return settings;
}

Column shape_column() {
  return {"N x K", 13, [](const Record& record) -> std::string {
            const auto* shape = record.find<std::vector<int64_t>>("shape");
            return shape == nullptr ? kNoValue : to_string(Shape{shape->front(), shape->back()});
          }};
}

/// Cases in the order in which a table is read: formats, then shapes, then rows, then kernels.
Plan plan_of(const Options& options, Machine& machine, double copy_rate,
             const std::vector<const Operation*>& operations, const std::vector<Sizes>& all_sizes) {
  Plan plan;
  const auto bench = std::make_shared<Bench>(machine, copy_rate);
  std::vector<qn::Op> ops;
  for (const Operation* operation : operations) {
    std::vector<std::string> kernels = {""};
    if (operation->op) {
      ops.push_back(*operation->op);
      kernels = kernels_to_measure(*operation->op, machine.device().type, options.kernel);
    }
    for (const auto& [dtype, format] : settings_of(options)) {
      for (const Shape shape : shapes_of(options)) {
        for (const Sizes sizes : all_sizes) {
          for (const std::string& kernel : kernels) {
            plan.cases.push_back(case_of(bench, {operation, shape, dtype, format, sizes, kernel}));
          }
        }
      }
    }
  }
  if (plan.cases.empty()) refuse_kernel(ops, machine.device().type, options.kernel);
  for (const Model* model : options.models) {
    for (const Linear& linear : linears_of(*model)) {
      plan.notes.push_back(std::string(model->name) + " " + to_string(linear.shape) + ": " +
                           linear.names);
    }
  }
  return plan;
}

std::vector<Column> conversion_columns() {
  return columns_of({{shape_column()}, time_columns(), rate_columns("copy"), {kernel_column()}});
}

}  // namespace

Plan quantize_plan(const Options& options, Machine& machine, double copy_rate) {
  Plan plan = plan_of(options, machine, copy_rate, {&kQuantize}, {Sizes{}});
  plan.columns = conversion_columns();
  return plan;
}

Plan dequantize_plan(const Options& options, Machine& machine, double copy_rate) {
  Plan plan = plan_of(options, machine, copy_rate, {&kDequantize}, {Sizes{}});
  plan.columns = conversion_columns();
  return plan;
}

Plan matmul_plan(const Options& options, Machine& machine, double copy_rate) {
  std::vector<const Operation*> operations;
  for (const bool transposed : options.transposed) {
    operations.push_back(transposed ? &kMatmulTransposed : &kMatmul);
  }
  std::vector<Sizes> sizes;
  for (const int64_t m : options.rows) sizes.push_back({.m = m});
  Plan plan = plan_of(options, machine, copy_rate, operations, sizes);
  plan.columns = columns_of({{shape_column(), number_column("M", 6, "m", "%.0f")},
                             time_columns(),
                             rate_columns("copy"),
                             {measured_column("TFLOP/s", 9, "tflop_per_s", 4), kernel_column()}});
  return plan;
}

Plan lora_plan(const Options& options, Machine& machine, double copy_rate) {
  std::vector<const Operation*> operations;
  for (const std::string& pass : options.passes) {
    operations.push_back(pass == "forward" ? &kLoraForward : &kLoraBackward);
  }
  std::vector<Sizes> sizes;
  for (const int64_t m : options.rows) {
    for (const int64_t rank : options.ranks) sizes.push_back({.m = m, .rank = rank});
  }
  Plan plan = plan_of(options, machine, copy_rate, operations, sizes);
  plan.columns = columns_of({{shape_column(), number_column("M", 6, "m", "%.0f"),
                              number_column("rank", 6, "rank", "%.0f")},
                             time_columns(),
                             rate_columns("copy"),
                             {measured_column("TFLOP/s", 9, "tflop_per_s", 4)}});
  return plan;
}

}  // namespace bench
