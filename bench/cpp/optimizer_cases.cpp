#include "optimizer_cases.h"

#include <cstdio>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "columns.h"
#include "kernel_names.h"
#include "optimizer_problem.h"
#include "verify_optimizer.h"

namespace bench {
namespace {

namespace qn = qlora_native;

/// More than one, so that moments that are not zero are part of it.
constexpr int kCheckedSteps = 3;

struct OptimizerCase {
  std::string tensors;
  qn::DType dtype;
  std::string optimizer;
  std::string kernel;  ///< "": the library's choice
};

int64_t elements_of(const TensorSizes& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
}

/// Gives the choice of the kernel back to the library when a case is over.
struct Forced {
  explicit Forced(qn::DeviceType device) : device(device) {}
  ~Forced() { unforce_kernels(device); }
  Forced(const Forced&) = delete;
  Forced& operator=(const Forced&) = delete;
  qn::DeviceType device;
};

Timed prepare(Machine& machine, double copy_rate, const OptimizerCase& wanted) {
  const TensorSizes sizes = tensor_sizes_of(wanted.tensors);
  const OptimizerKind kind = optimizer_kind_of(wanted.optimizer);
  const auto problem = std::make_shared<OptimizerProblem>(machine, sizes, wanted.dtype, kind);
  const std::string choice = problem->kernel();
  const auto forced = std::make_shared<Forced>(machine.device().type);
  qn::force_kernel(qn::Op::kOptimizerStep, machine.device().type, wanted.kernel);
  const std::string kernel = problem->kernel();
  for (int i = 0; i < kCheckedSteps; ++i) {
    const StepCheck check(*problem);
    problem->step();
    const std::string wrong = check.compare();
    if (!wrong.empty()) throw std::runtime_error("wrong result: " + wrong);
  }
  const auto calls =
      std::make_shared<const std::vector<std::function<void()>>>(1, [problem] { problem->step(); });
  const std::function<double()> replay = machine.replay(*calls);
  replay();
  Timed timed{
      .replay = [calls, forced, replay] { return replay(); },
      .bytes = static_cast<double>(elements_of(sizes)) * bytes_per_element(kind, wanted.dtype),
      .ceiling = copy_rate};
  timed.facts.set("kernel", kernel);
  if (!wanted.kernel.empty()) timed.facts.set("is_choice", kernel == choice);
  return timed;
}

Case case_of(Machine& machine, double copy_rate, const OptimizerCase& wanted) {
  const TensorSizes sizes = tensor_sizes_of(wanted.tensors);
  const std::string dtype = short_name(wanted.dtype);
  Case made;
  made.name = "optimizer/" + wanted.tensors + "/" + wanted.optimizer + "/" + dtype;
  if (!wanted.kernel.empty()) made.name += "/" + wanted.kernel;
  char millions[32];
  std::snprintf(millions, sizeof millions, "%.3g", static_cast<double>(elements_of(sizes)) * 1e-6);
  made.heading = wanted.tensors + ": " + std::to_string(sizes.size()) + " tensors, " + millions +
                 " M parameters, " + dtype;
  made.facts = {{"op", "optimizer"},
                {"case", wanted.tensors},
                {"optimizer", wanted.optimizer},
                {"dtype", dtype},
                {"tensors", std::ssize(sizes)},
                {"parameters", elements_of(sizes)},
                {"bytes_per_parameter",
                 bytes_per_element(optimizer_kind_of(wanted.optimizer), wanted.dtype)}};
  if (!wanted.kernel.empty()) made.facts.set("kernel", wanted.kernel);
  made.prepare = [&machine, copy_rate, wanted] { return prepare(machine, copy_rate, wanted); };
  return made;
}

}  // namespace

Plan optimizer_plan(const Options& options, Machine& machine, double copy_rate) {
  constexpr qn::Op kOps[] = {qn::Op::kOptimizerStep};
  const qn::DeviceType device = machine.device().type;
  const std::vector<qn::DType> dtypes =
      options.dtypes.empty() ? std::vector{qn::DType::kFloat32} : options.dtypes;
  Plan plan;
  for (const std::string& tensors : options.optimizer_cases) {
    for (const qn::DType dtype : dtypes) {
      for (const std::string& optimizer : options.optimizers) {
        for (const std::string& kernel : kernels_to_measure(kOps[0], device, options.kernel)) {
          plan.cases.push_back(case_of(machine, copy_rate, {tensors, dtype, optimizer, kernel}));
        }
      }
    }
  }
  if (plan.cases.empty()) refuse_kernel(kOps, device, options.kernel);
  plan.columns = columns_of({{text_column("optimizer", -11, "optimizer"),
                              number_column("B/param", 9, "bytes_per_parameter", "%.2f")},
                             time_columns(),
                             rate_columns("copy"),
                             {kernel_column()}});
  return plan;
}

}  // namespace bench
