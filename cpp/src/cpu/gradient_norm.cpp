// The norm of all gradients:
//   sums[task] = the squares of a run of one array, summed in fp64 over kLanes interleaved lanes,
//                then over the lanes in order;
//   norm       = sqrt(the sums in order).
#include <algorithm>
#include <cmath>

#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kElementsPerTask = 32 * 1024;
constexpr int64_t kLanes = 8;

int64_t tasks_of(const VectorView& grad) { return num_blocks(grad.size, kElementsPerTask); }

int64_t count_tasks(const GradientNormArgs& args) {
  int64_t tasks = 0;
  for (const VectorView& grad : args.grads) tasks += tasks_of(grad);
  return tasks;
}

template <DType kType>
double sum_of_squares(const void* data, int64_t first, int64_t last) {
  double lanes[kLanes] = {};
  const auto square = [&](int64_t i) {
    const float x = load_element(data, i, kType);
    return static_cast<double>(x * x);
  };
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += square(i + lane);
  }
  for (int64_t lane = 0; i < last; ++i, ++lane) lanes[lane] += square(i);
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

double sum_of_squares(const VectorView& grad, int64_t first, int64_t last) {
  switch (grad.dtype) {
    case DType::kFloat32:
      return sum_of_squares<DType::kFloat32>(grad.data, first, last);
    case DType::kFloat16:
      return sum_of_squares<DType::kFloat16>(grad.data, first, last);
    default:
      return sum_of_squares<DType::kBFloat16>(grad.data, first, last);
  }
}

}  // namespace

int64_t gradient_norm_workspace_bytes(const GradientNormArgs& args) {
  return count_tasks(args) * static_cast<int64_t>(sizeof(double));
}

void gradient_norm_scalar(const GradientNormArgs& args, Workspace workspace) {
  auto* const sums = static_cast<double*>(workspace.data);
  int64_t first_task = 0;
  for (const VectorView& grad : args.grads) {
    parallel_for(tasks_of(grad), 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task * kElementsPerTask;
        sums[first_task + task] =
            sum_of_squares(grad, begin, std::min(begin + kElementsPerTask, grad.size));
      }
    });
    first_task += tasks_of(grad);
  }
  double total = 0.0;
  for (int64_t task = 0; task < first_task; ++task) total += sums[task];
  *args.norm = static_cast<float>(std::sqrt(total));
}

}  // namespace qlora_native::cpu
