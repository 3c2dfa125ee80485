// The argument checks of the optimizer operations.
#include <cmath>
#include <limits>
#include <string>

#include "validate.h"
#include "validation_failure.h"

namespace qlora_native {
namespace {

constexpr const char* kStep = "optimizer_step";
constexpr const char* kNorm = "gradient_norm";
/// So that no array has more bytes than an int64_t holds.
constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 8;

template <class Enum>
bool is_known(Enum value, Enum last) {
  const auto code = static_cast<int32_t>(value);
  return code >= 0 && code <= static_cast<int32_t>(last);
}

void check_beta(size_t group, const char* what, double beta) {
  if (!(beta >= 0.0 && beta < 1.0)) {
    fail(kStep, ": group ", group, " has ", what, " ", beta, ", expected 0 <= ", what, " < 1");
  }
}

void check_group(size_t index, const OptimizerGroup& group) {
  check_beta(index, "beta1", group.beta1);
  check_beta(index, "beta2", group.beta2);
  if (!std::isfinite(group.lr)) fail(kStep, ": group ", index, " has lr ", group.lr);
  if (!(group.eps >= 0.0)) fail(kStep, ": group ", index, " has eps ", group.eps, ", below 0");
  if (!std::isfinite(group.weight_decay)) {
    fail(kStep, ": group ", index, " has weight_decay ", group.weight_decay);
  }
}

void check_array(size_t tensor, const char* what, const void* data, int64_t numel) {
  if (data == nullptr && numel > 0) {
    fail(kStep, ": ", what, " of tensor ", tensor, " is null, but it has ", numel, " elements");
  }
}

void check_absent(size_t tensor, const char* what, const void* data, const char* why) {
  if (data != nullptr) {
    fail(kStep, ": ", what, " of tensor ", tensor, " is given, but ", why);
  }
}

void check_states(size_t index, const OptimizerTensor& tensor, OptimizerAlgorithm algorithm) {
  const bool has_squares = algorithm == OptimizerAlgorithm::kAdamW;
  check_array(index, "state1", tensor.state1, tensor.numel);
  if (has_squares) {
    check_array(index, "state2", tensor.state2, tensor.numel);
  } else {
    check_absent(index, "state2", tensor.state2, "lion has one state");
    check_absent(index, "absmax2", tensor.absmax2, "lion has one state");
  }
  if (tensor.state_format == StateFormat::kFloat32) {
    check_absent(index, "absmax1", tensor.absmax1, "its state is fp32");
    check_absent(index, "absmax2", tensor.absmax2, "its state is fp32");
  } else {
    check_array(index, "absmax1", tensor.absmax1, tensor.numel);
    if (has_squares) check_array(index, "absmax2", tensor.absmax2, tensor.numel);
  }
}

void check_tensor(size_t index, const OptimizerTensor& tensor, OptimizerAlgorithm algorithm,
                  size_t groups) {
  if (tensor.numel < 0 || tensor.numel > kMaxElements) {
    fail(kStep, ": tensor ", index, " has ", tensor.numel, " elements");
  }
  if (tensor.group < 0 || static_cast<size_t>(tensor.group) >= groups) {
    fail(kStep, ": tensor ", index, " is of group ", tensor.group, ", there are ", groups);
  }
  if (!is_known(tensor.param_dtype, DType::kBFloat16) ||
      !is_known(tensor.grad_dtype, DType::kBFloat16) ||
      !is_known(tensor.state_format, StateFormat::kDynamic8bit)) {
    fail(kStep, ": tensor ", index, " has an unknown dtype code or state format");
  }
  if (tensor.grad_dtype != tensor.param_dtype && tensor.grad_dtype != DType::kFloat32) {
    fail(kStep, ": tensor ", index, " is ", name(tensor.param_dtype), ", its gradient ",
         name(tensor.grad_dtype), ", expected the same or float32");
  }
  check_array(index, "param", tensor.param, tensor.numel);
  check_array(index, "grad", tensor.grad, tensor.numel);
  check_states(index, tensor, algorithm);
  if (tensor.param_dtype == DType::kFloat32) {
    check_absent(index, "master", tensor.master, "the parameter is fp32 itself");
  }
  if (tensor.step == nullptr) fail(kStep, ": step of tensor ", index, " is null");
  if (tensor.first_element < 0 || tensor.first_element % kStateBlockSize != 0) {
    fail(kStep, ": tensor ", index, " starts at element ", tensor.first_element,
         " of its parameter, which is no multiple of ", kStateBlockSize);
  }
}

}  // namespace

void validate(const OptimizerStepArgs& args) {
  if (!is_known(args.algorithm, OptimizerAlgorithm::kLion)) {
    fail(kStep, ": unknown algorithm code ", static_cast<int32_t>(args.algorithm));
  }
  for (size_t i = 0; i < args.groups.size(); ++i) check_group(i, args.groups[i]);
  for (size_t i = 0; i < args.tensors.size(); ++i) {
    check_tensor(i, args.tensors[i], args.algorithm, args.groups.size());
  }
  if (!(args.max_norm >= 0.0)) fail(kStep, ": max_norm is ", args.max_norm, ", below 0");
  if (args.grad_norm == nullptr && (args.max_norm > 0.0 || args.skip_nonfinite)) {
    fail(kStep, ": clipping (max_norm ", args.max_norm,
         ") and skip_nonfinite need grad_norm, which is null");
  }
}

void validate(const GradientNormArgs& args) {
  if (args.norm == nullptr) fail(kNorm, ": norm is null");
  for (size_t i = 0; i < args.grads.size(); ++i) {
    const VectorView& grad = args.grads[i];
    if (!is_known(grad.dtype, DType::kBFloat16)) {
      fail(kNorm, ": gradient ", i, " has an unknown dtype code ",
           static_cast<int32_t>(grad.dtype));
    }
    if (grad.size < 0 || (grad.data == nullptr && grad.size > 0)) {
      fail(kNorm, ": gradient ", i, " has ", grad.size, " elements at ",
           grad.data ? "some" : "a null", " address");
    }
    if (grad.size > kMaxElements) fail(kNorm, ": gradient ", i, " has ", grad.size, " elements");
    if (grad.device != args.device) {
      fail(kNorm, ": gradient ", i, " is on ", to_string(grad.device), ", the call is for ",
           to_string(args.device));
    }
  }
}

}  // namespace qlora_native
