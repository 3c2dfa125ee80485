// Optimizer steps: the driver and the portable kernel.
#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/optimizer_blocks.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

/// Elements that a worker takes at a time: long enough to hide the hand-over, short enough that two
/// threads end together.
constexpr int64_t kElementsPerTask = 64 * kStateBlockSize;

/// What the workspace holds for each tensor.
struct TensorPlan {
  StepScalars scalars;
  int64_t first_task;
};

float value_or(const float* pointer, float fallback) { return pointer ? *pointer : fallback; }

/// Fills in `plans`; returns the number of tasks, 0 when the step is skipped.
int64_t plan_tensors(const OptimizerStepArgs& args, TensorPlan* plans) {
  const StepConditions conditions{.grad_scale = value_or(args.grad_scale, 1.0f),
                                  .found_inf = value_or(args.found_inf, 0.0f),
                                  .grad_norm = value_or(args.grad_norm, 0.0f)};
  int64_t tasks = 0;
  for (size_t i = 0; i < args.tensors.size(); ++i) {
    const OptimizerTensor& tensor = args.tensors[i];
    const OptimizerGroup& group = args.groups[static_cast<size_t>(tensor.group)];
    const double lr = group.lr_on_device ? double{*group.lr_on_device} : group.lr;
    plans[i] = {
        step_scalars(args.algorithm, group, lr, *tensor.step, static_cast<float>(args.max_norm),
                     args.skip_nonfinite, conditions, [](double x) { return std::sqrt(x); }),
        tasks};
    if (plans[i].scalars.skips) return 0;
    tasks += num_blocks(tensor.numel, kElementsPerTask);
  }
  return tasks;
}

/// Many small tensors are handed over together, a few not at all.
int64_t tasks_at_a_time(const OptimizerStepArgs& args, int64_t tasks) {
  int64_t numel = 1;
  for (const OptimizerTensor& tensor : args.tensors) numel += tensor.numel;
  return std::max<int64_t>(1, tasks * kElementsPerTask / numel);
}

}  // namespace

int64_t optimizer_step_workspace_bytes(const OptimizerStepArgs& args) {
  return static_cast<int64_t>(args.tensors.size() * sizeof(TensorPlan));
}

void run_optimizer_step(const OptimizerStepArgs& args, Workspace workspace, StepElementsFn step) {
  auto* const plans = static_cast<TensorPlan*>(workspace.data);
  TensorPlan* const end = plans + args.tensors.size();
  const int64_t tasks = plan_tensors(args, plans);
  const StepCall call{args.algorithm, args.stochastic_rounding, args.seed};
  parallel_for(tasks, tasks_at_a_time(args, tasks), [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      // The last tensor that starts at or before the task; tensors without elements have none.
      const TensorPlan* const plan =
          std::upper_bound(plans, end, task,
                           [](int64_t wanted, const TensorPlan& candidate) {
                             return wanted < candidate.first_task;
                           }) -
          1;
      const OptimizerTensor& tensor = args.tensors[static_cast<size_t>(plan - plans)];
      const int64_t begin = (task - plan->first_task) * kElementsPerTask;
      step(call, tensor, plan->scalars, begin, std::min(begin + kElementsPerTask, tensor.numel));
    }
  });
  if (args.tensors.empty() || plans->scalars.skips) return;
  for (size_t i = 0; i < args.tensors.size(); ++i) {
    if (args.tensors[i].advances_step) *args.tensors[i].step = plans[i].scalars.step;
  }
}

void step_elements_scalar(const StepCall& call, const OptimizerTensor& tensor,
                          const StepScalars& scalars, int64_t first, int64_t last) {
  step_elements<Portable>(call, tensor, scalars, first, last);
}

}  // namespace qlora_native::cpu
