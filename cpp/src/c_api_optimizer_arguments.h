// The C ABI's optimizer structs as the arguments of the C++ operations; see c_api_arguments.h.
#pragma once

#include <vector>

#include "qlora_native/c_api_optimizer.h"
#include "qlora_native/optimizer.h"

namespace qlora_native::c_api {

/// An optimizer's arguments and the arrays that they are views of.
struct OptimizerCall {
  std::vector<OptimizerTensor> tensors;
  std::vector<OptimizerGroup> groups;
  OptimizerStepArgs args;
};

struct GradientNormCall {
  std::vector<VectorView> grads;
  GradientNormArgs args;
};

OptimizerCall to_call(const char* function, const qn_optimizer_args* args);
GradientNormCall to_call(const char* function, const qn_gradient_norm_args* args);

}  // namespace qlora_native::c_api
