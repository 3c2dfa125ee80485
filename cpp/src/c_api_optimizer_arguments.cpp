#include "c_api_optimizer_arguments.h"

#include <string>

#include "c_api_arguments.h"
#include "c_api_guard.h"
#include "c_api_struct.h"

namespace qlora_native::c_api {
namespace {

/// Refuses a negative count, and an array that is missing.
size_t to_count(const char* function, const char* what, const void* array, int64_t count) {
  if (count < 0) {
    fail(function, std::string("the number of ") + what + " is " + std::to_string(count));
  }
  if (count > 0) check_pointer(function, what, array, alignof(void*));
  return static_cast<size_t>(count);
}

OptimizerTensor to_tensor(const char* function, const qn_optimizer_tensor* given) {
  const qn_optimizer_tensor tensor = read_struct(function, "a tensor", given);
  const DType param_dtype = to_dtype(function, tensor.param_dtype);
  const DType grad_dtype = to_dtype(function, tensor.grad_dtype);
  check_enum(function, "state_format", tensor.state_format, QN_STATE_DYNAMIC_8BIT + 1);
  const auto format = static_cast<StateFormat>(tensor.state_format);
  const int64_t state_alignment = format == StateFormat::kFloat32 ? alignof(float) : 1;
  check_alignment(function, "param", tensor.param, size_bytes(param_dtype));
  check_alignment(function, "grad", tensor.grad, size_bytes(grad_dtype));
  check_alignment(function, "state1", tensor.state1, state_alignment);
  check_alignment(function, "state2", tensor.state2, state_alignment);
  check_alignment(function, "absmax1", tensor.absmax1, alignof(float));
  check_alignment(function, "absmax2", tensor.absmax2, alignof(float));
  check_alignment(function, "master", tensor.master, alignof(float));
  check_alignment(function, "step", tensor.step, alignof(float));
  return {.param = tensor.param,
          .grad = tensor.grad,
          .state1 = tensor.state1,
          .state2 = tensor.state2,
          .absmax1 = tensor.absmax1,
          .absmax2 = tensor.absmax2,
          .master = tensor.master,
          .step = tensor.step,
          .numel = tensor.numel,
          .group = tensor.group,
          .param_dtype = param_dtype,
          .grad_dtype = grad_dtype,
          .state_format = format,
          .advances_step = !to_bool(function, "keeps_step", tensor.keeps_step),
          .first_element = tensor.first_element,
          .random_stream = tensor.random_stream};
}

OptimizerGroup to_group(const char* function, const qn_optimizer_group* given) {
  const qn_optimizer_group group = read_struct(function, "a group", given);
  check_reserved(function, "a group", group.reserved);
  check_alignment(function, "lr_on_device", group.lr_on_device, alignof(float));
  return {.lr = group.lr,
          .lr_on_device = group.lr_on_device,
          .beta1 = group.beta1,
          .beta2 = group.beta2,
          .eps = group.eps,
          .weight_decay = group.weight_decay,
          .maximize = to_bool(function, "maximize", group.maximize)};
}

}  // namespace

OptimizerCall to_call(const char* function, const qn_optimizer_args* given) {
  const qn_optimizer_args args = read_struct(function, "args", given);
  check_reserved(function, "args", args.reserved);
  check_enum(function, "algorithm", args.algorithm, QN_LION + 1);
  check_alignment(function, "grad_scale", args.grad_scale, alignof(float));
  check_alignment(function, "found_inf", args.found_inf, alignof(float));
  check_alignment(function, "grad_norm", args.grad_norm, alignof(float));
  OptimizerCall call;
  call.tensors.resize(to_count(function, "tensors", args.tensors, args.num_tensors));
  call.groups.resize(to_count(function, "groups", args.groups, args.num_groups));
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    call.tensors[i] = to_tensor(function, args.tensors[i]);
  }
  for (size_t i = 0; i < call.groups.size(); ++i) {
    call.groups[i] = to_group(function, args.groups[i]);
  }
  call.args = {
      .algorithm = static_cast<OptimizerAlgorithm>(args.algorithm),
      .tensors = call.tensors,
      .groups = call.groups,
      .device = to_device(function, args.device_type, args.device_index),
      .grad_scale = args.grad_scale,
      .found_inf = args.found_inf,
      .grad_norm = args.grad_norm,
      .max_norm = args.max_norm,
      .skip_nonfinite = to_bool(function, "skip_nonfinite", args.skip_nonfinite),
      .stochastic_rounding = to_bool(function, "stochastic_rounding", args.stochastic_rounding),
      .seed = args.seed};
  return call;
}

GradientNormCall to_call(const char* function, const qn_gradient_norm_args* given) {
  const qn_gradient_norm_args args = read_struct(function, "args", given);
  GradientNormCall call;
  const Device device = to_device(function, args.device_type, args.device_index);
  call.grads.resize(to_count(function, "grads", args.grads, args.num_grads));
  to_count(function, "sizes", args.sizes, args.num_grads);
  if (args.num_grads > 0) check_pointer(function, "dtypes", args.dtypes, alignof(qn_dtype));
  check_alignment(function, "norm", args.norm, alignof(float));
  for (size_t i = 0; i < call.grads.size(); ++i) {
    const DType dtype = to_dtype(function, args.dtypes[i]);
    check_alignment(function, "grad", args.grads[i], size_bytes(dtype));
    call.grads[i] = {args.grads[i], args.sizes[i], dtype, device};
  }
  call.args = {.grads = call.grads, .norm = args.norm, .device = device};
  return call;
}

}  // namespace qlora_native::c_api
