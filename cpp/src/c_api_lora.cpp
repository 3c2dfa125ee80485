// The adapters of the C ABI: structs as the arguments of the C++ operations, and the functions.
#include "qlora_native/c_api_lora.h"

#include "c_api_arguments.h"
#include "c_api_guard.h"
#include "c_api_operation.h"
#include "c_api_struct.h"

namespace qlora_native::c_api {
namespace {

/// What all matrices of a call share.
struct Place {
  const char* function;
  Device device;

  MutableMatrixView matrix(const char* what, void* data, int64_t rows, int64_t cols,
                           int64_t row_stride, qn_dtype given) const {
    const DType dtype = to_dtype(function, given);
    check_alignment(function, what, data, size_bytes(dtype));
    return {data, rows, cols, row_stride, dtype, device};
  }

  MatrixView matrix(const char* what, const void* data, int64_t rows, int64_t cols,
                    int64_t row_stride, qn_dtype given) const {
    const DType dtype = to_dtype(function, given);
    check_alignment(function, what, data, size_bytes(dtype));
    return {data, rows, cols, row_stride, dtype, device};
  }
};

template <class Given>
Place place_of(const char* function, const Given& args) {
  check_reserved(function, "args", args.reserved);
  return {function, to_device(function, args.device_type, args.device_index)};
}

template <class Given>
Dropout to_dropout(const Given& args) {
  return {.p = args.dropout_p, .seed = args.dropout_seed, .offset = args.dropout_offset};
}

}  // namespace

LoraProjectArgs to_args(const char* function, const qn_lora_project_args* given) {
  const qn_lora_project_args args = read_struct(function, "args", given);
  const Place place = place_of(function, args);
  const bool transposed = to_bool(function, "factor_transposed", args.factor_transposed);
  return {.x = place.matrix("x", args.x, args.m, args.c, args.x_row_stride, args.dtype),
          .factor =
              place.matrix("factor", args.factor, transposed ? args.c : args.r,
                           transposed ? args.r : args.c, args.factor_row_stride, args.factor_dtype),
          .factor_transposed = transposed,
          .scaling = args.scaling,
          .dropout = to_dropout(args),
          .t = place.matrix("t", args.t, args.m, args.r, args.t_row_stride, args.dtype)};
}

LoraUpdateArgs to_args(const char* function, const qn_lora_update_args* given) {
  const qn_lora_update_args args = read_struct(function, "args", given);
  const Place place = place_of(function, args);
  const bool transposed = to_bool(function, "factor_transposed", args.factor_transposed);
  return {.t = place.matrix("t", args.t, args.m, args.r, args.t_row_stride, args.dtype),
          .factor =
              place.matrix("factor", args.factor, transposed ? args.r : args.c,
                           transposed ? args.c : args.r, args.factor_row_stride, args.factor_dtype),
          .factor_transposed = transposed,
          .scaling = args.scaling,
          .dropout = to_dropout(args),
          .y = place.matrix("y", args.y, args.m, args.c, args.y_row_stride, args.dtype)};
}

LoraGradientArgs to_args(const char* function, const qn_lora_gradient_args* given) {
  const qn_lora_gradient_args args = read_struct(function, "args", given);
  const Place place = place_of(function, args);
  const bool transposed = to_bool(function, "transposed", args.transposed);
  return {
      .s = place.matrix("s", args.s, args.m, args.r, args.s_row_stride, args.dtype),
      .v = place.matrix("v", args.v, args.m, args.c, args.v_row_stride, args.dtype),
      .scaling = args.scaling,
      .dropout = to_dropout(args),
      .transposed = transposed,
      .grad = place.matrix("grad", args.grad, transposed ? args.c : args.r,
                           transposed ? args.r : args.c, args.grad_row_stride, args.grad_dtype)};
}

LoraForwardArgs to_args(const char* function, const qn_lora_forward_args* given) {
  const qn_lora_forward_args args = read_struct(function, "args", given);
  check_reserved(function, "args", args.reserved);
  const QuantizedView weight = to_weight_view(function, "weight", args.weight);
  const Place place{function, weight.device};
  const DType dtype = to_dtype(function, args.dtype);
  check_alignment(function, "bias", args.bias, size_bytes(dtype));
  LoraForwardArgs out{
      .x = place.matrix("x", args.x, args.m, weight.cols, args.x_row_stride, args.dtype),
      .weight = weight,
      .bias = {args.bias, weight.rows, dtype, weight.device},
      .a = place.matrix("a", args.a, args.r, weight.cols, args.a_row_stride, args.a_dtype),
      .b = place.matrix("b", args.b, weight.rows, args.r, args.b_row_stride, args.b_dtype),
      .scaling = args.scaling,
      .dropout = to_dropout(args),
      .t = {},
      .y = place.matrix("y", args.y, args.m, weight.rows, args.y_row_stride, args.dtype)};
  if (args.t != nullptr) {
    out.t = place.matrix("t", args.t, args.m, args.r, args.t_row_stride, args.dtype);
  }
  return out;
}

LoraBackwardArgs to_args(const char* function, const qn_lora_backward_args* given) {
  const qn_lora_backward_args args = read_struct(function, "args", given);
  check_reserved(function, "args", args.reserved);
  const QuantizedView weight = to_weight_view(function, "weight", args.weight);
  const Place place{function, weight.device};
  const int64_t n = weight.rows;
  const int64_t k = weight.cols;
  LoraBackwardArgs out{};
  out.dy = place.matrix("dy", args.dy, args.m, n, args.dy_row_stride, args.dtype);
  out.weight = weight;
  out.scaling = args.scaling;
  out.dropout = to_dropout(args);
  if (args.dx != nullptr || args.da != nullptr) {
    out.b = place.matrix("b", args.b, n, args.r, args.b_row_stride, args.b_dtype);
  }
  if (args.dx != nullptr) {
    out.a = place.matrix("a", args.a, args.r, k, args.a_row_stride, args.a_dtype);
    out.dx = place.matrix("dx", args.dx, args.m, k, args.dx_row_stride, args.dtype);
  }
  if (args.da != nullptr) {
    out.x = place.matrix("x", args.x, args.m, k, args.x_row_stride, args.dtype);
    out.da = place.matrix("da", args.da, args.r, k, args.da_row_stride, args.da_dtype);
  }
  if (args.db != nullptr) {
    out.t = place.matrix("t", args.t, args.m, args.r, args.t_row_stride, args.dtype);
    out.db = place.matrix("db", args.db, n, args.r, args.db_row_stride, args.db_dtype);
  }
  return out;
}

}  // namespace qlora_native::c_api

namespace qn = qlora_native;
using qn::c_api::run;
using qn::c_api::write_bytes;
using qn::c_api::write_plan;
using qn::c_api::write_selected;

qn_status qn_lora_project(const qn_lora_project_args* args, void* workspace,
                          int64_t workspace_bytes, void* stream) {
  return run(__func__, qn::lora_project, args, workspace, workspace_bytes, stream);
}

qn_status qn_lora_project_workspace_bytes(const qn_lora_project_args* args,
                                          int64_t* workspace_bytes) {
  return write_bytes(__func__, qn::lora_project_workspace_bytes, args, workspace_bytes);
}

qn_status qn_lora_project_plan(const qn_lora_project_args* args, qn_matmul_plan* plan) {
  return write_plan(__func__, qn::lora_project_plan, args, plan);
}

qn_status qn_lora_project_selected_kernel(const qn_lora_project_args* args, char* name,
                                          int64_t name_bytes) {
  return write_selected(__func__, args, name, name_bytes);
}

qn_status qn_lora_update(const qn_lora_update_args* args, void* workspace, int64_t workspace_bytes,
                         void* stream) {
  return run(__func__, qn::lora_update, args, workspace, workspace_bytes, stream);
}

qn_status qn_lora_update_workspace_bytes(const qn_lora_update_args* args,
                                         int64_t* workspace_bytes) {
  return write_bytes(__func__, qn::lora_update_workspace_bytes, args, workspace_bytes);
}

qn_status qn_lora_update_plan(const qn_lora_update_args* args, qn_matmul_plan* plan) {
  return write_plan(__func__, qn::lora_update_plan, args, plan);
}

qn_status qn_lora_update_selected_kernel(const qn_lora_update_args* args, char* name,
                                         int64_t name_bytes) {
  return write_selected(__func__, args, name, name_bytes);
}

qn_status qn_lora_gradient(const qn_lora_gradient_args* args, void* workspace,
                           int64_t workspace_bytes, void* stream) {
  return run(__func__, qn::lora_gradient, args, workspace, workspace_bytes, stream);
}

qn_status qn_lora_gradient_workspace_bytes(const qn_lora_gradient_args* args,
                                           int64_t* workspace_bytes) {
  return write_bytes(__func__, qn::lora_gradient_workspace_bytes, args, workspace_bytes);
}

qn_status qn_lora_gradient_plan(const qn_lora_gradient_args* args, qn_matmul_plan* plan) {
  return write_plan(__func__, qn::lora_gradient_plan, args, plan);
}

qn_status qn_lora_gradient_selected_kernel(const qn_lora_gradient_args* args, char* name,
                                           int64_t name_bytes) {
  return write_selected(__func__, args, name, name_bytes);
}

qn_status qn_lora_forward(const qn_lora_forward_args* args, void* workspace,
                          int64_t workspace_bytes, void* stream) {
  return run(__func__, qn::lora_forward, args, workspace, workspace_bytes, stream);
}

qn_status qn_lora_forward_workspace_bytes(const qn_lora_forward_args* args,
                                          int64_t* workspace_bytes) {
  return write_bytes(__func__, qn::lora_forward_workspace_bytes, args, workspace_bytes);
}

qn_status qn_lora_backward(const qn_lora_backward_args* args, void* workspace,
                           int64_t workspace_bytes, void* stream) {
  return run(__func__, qn::lora_backward, args, workspace, workspace_bytes, stream);
}

qn_status qn_lora_backward_workspace_bytes(const qn_lora_backward_args* args,
                                           int64_t* workspace_bytes) {
  return write_bytes(__func__, qn::lora_backward_workspace_bytes, args, workspace_bytes);
}
