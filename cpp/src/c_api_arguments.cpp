#include "c_api_arguments.h"

#include <algorithm>

#include "c_api_guard.h"
#include "c_api_struct.h"

namespace qlora_native::c_api {
namespace {

MutableQuantizedView to_weight(const char* function, const char* what, const qn_weight* given) {
  const qn_weight weight = read_struct(function, what, given);
  check_reserved(function, what, weight.reserved);
  check_alignment(function, "absmax", weight.absmax, alignof(float));
  check_alignment(function, "absmax2", weight.absmax2, alignof(float));
  check_alignment(function, "offset", weight.offset, alignof(float));
  if (weight.absmax_codes == nullptr && (weight.absmax2 != nullptr || weight.offset != nullptr)) {
    fail(function, "absmax2 or offset is given, but absmax_codes is null");
  }
  return {.packed = weight.packed,
          .absmax = {weight.absmax, weight.absmax_codes, weight.absmax2, weight.offset},
          .rows = weight.rows,
          .cols = weight.cols,
          .block_size = weight.block_size,
          .codebook = to_codebook(function, weight.quant_type, weight.custom_values),
          .device = to_device(function, weight.device_type, weight.device_index)};
}

QuantizedView read_only(const MutableQuantizedView& view) {
  const MutableAbsmax& absmax = view.absmax;
  return {.packed = view.packed,
          .absmax = {absmax.values, absmax.codes, absmax.absmax2, absmax.offset},
          .rows = view.rows,
          .cols = view.cols,
          .block_size = view.block_size,
          .codebook = view.codebook,
          .device = view.device};
}

QuantizedStackView to_stack(const char* function, const qn_weight_stack* given) {
  const qn_weight_stack stack = read_struct(function, "weights", given);
  return {.first = read_only(to_weight(function, "first", stack.first)),
          .count = stack.count,
          .packed_stride = stack.packed_stride,
          .absmax_stride = stack.absmax_stride,
          .absmax2_stride = stack.absmax2_stride,
          .offset_stride = stack.offset_stride};
}

GroupEnds to_ends(const char* function, const void* ends, qn_index_type type,
                  const QuantizedStackView& stack) {
  check_enum(function, "index_type", type, QN_INT64 + 1);
  const int64_t bytes = type == QN_INT32 ? sizeof(int32_t) : sizeof(int64_t);
  check_alignment(function, "group_ends", ends, bytes);
  return {ends, stack.count, static_cast<IndexType>(type), stack.first.device};
}

/// The number of elements; anything for dimensions that the operation is going to refuse.
template <class View>
int64_t count_elements(const View& view) {
  int64_t count = 0;
  return __builtin_mul_overflow(view.rows, view.cols, &count) ? 0 : count;
}

}  // namespace

void check_alignment(const char* function, const char* what, const void* data, int64_t alignment) {
  if (data != nullptr) check_pointer(function, what, data, static_cast<uint64_t>(alignment));
}

void check_reserved(const char* function, const char* what, int32_t reserved) {
  if (reserved != 0) {
    fail(function,
         "reserved of " + std::string(what) + " is " + std::to_string(reserved) + ", expected 0");
  }
}

bool to_bool(const char* function, const char* what, int32_t value) {
  check_enum(function, what, value, 2);
  return value != 0;
}

DType to_dtype(const char* function, qn_dtype dtype) {
  check_enum(function, "dtype", dtype, QN_BFLOAT16 + 1);
  return static_cast<DType>(dtype);
}

Device to_device(const char* function, qn_device_type type, int32_t index) {
  check_device_type(function, type);
  if (index < 0 || (type == QN_CPU && index != 0)) {
    fail(function,
         "there is no device " + std::to_string(index) + " of type " + qn_device_type_name(type));
  }
  return {static_cast<DeviceType>(type), index};
}

Codebook to_codebook(const char* function, qn_quant_type type, const float* custom_values) {
  check_quant_type(function, type);
  if (type == QN_CUSTOM) {
    check_pointer(function, "custom_values", custom_values, alignof(float));
    float values[16];
    std::copy_n(custom_values, 16, values);
    return make_custom_codebook(values);
  }
  if (custom_values != nullptr) {
    fail(function,
         std::string("custom_values are given, but quant_type is ") + qn_quant_type_name(type));
  }
  return type == QN_NF4 ? kNF4 : type == QN_FP4 ? kFP4 : kINT4;
}

QuantizedView to_weight_view(const char* function, const char* what, const qn_weight* weight) {
  return read_only(to_weight(function, what, weight));
}

QuantizeArgs to_args(const char* function, const qn_quantize_args* given) {
  const qn_quantize_args args = read_struct(function, "args", given);
  check_reserved(function, "args", args.reserved);
  const DType dtype = to_dtype(function, args.dtype);
  check_alignment(function, "input", args.input, size_bytes(dtype));
  check_alignment(function, "pinned_offset", args.pinned_offset, alignof(float));
  const MutableQuantizedView output = to_weight(function, "output", args.output);
  return {.input = {args.input, count_elements(output), dtype, output.device},
          .output = output,
          .pinned_offset = args.pinned_offset};
}

DequantizeArgs to_args(const char* function, const qn_dequantize_args* given) {
  const qn_dequantize_args args = read_struct(function, "args", given);
  check_reserved(function, "args", args.reserved);
  const DType dtype = to_dtype(function, args.dtype);
  check_alignment(function, "output", args.output, size_bytes(dtype));
  const QuantizedView weight = to_weight_view(function, "weight", args.weight);
  return {.weight = weight, .output = {args.output, count_elements(weight), dtype, weight.device}};
}

MatmulArgs to_args(const char* function, const qn_matmul_args* given) {
  const qn_matmul_args args = read_struct(function, "args", given);
  check_reserved(function, "args", args.reserved);
  const DType dtype = to_dtype(function, args.dtype);
  check_alignment(function, "x", args.x, size_bytes(dtype));
  check_alignment(function, "bias", args.bias, size_bytes(dtype));
  check_alignment(function, "y", args.y, size_bytes(dtype));
  const QuantizedView weight = to_weight_view(function, "weight", args.weight);
  return {.x = {args.x, args.m, weight.cols, args.x_row_stride, dtype, weight.device},
          .weight = weight,
          .bias = {args.bias, weight.rows, dtype, weight.device},
          .y = {args.y, args.m, weight.rows, args.y_row_stride, dtype, weight.device}};
}

MatmulTransposedArgs to_args(const char* function, const qn_matmul_transposed_args* given) {
  const qn_matmul_transposed_args args = read_struct(function, "args", given);
  check_reserved(function, "args", args.reserved);
  const DType dtype = to_dtype(function, args.dtype);
  check_alignment(function, "dy", args.dy, size_bytes(dtype));
  check_alignment(function, "dx", args.dx, size_bytes(dtype));
  const QuantizedView weight = to_weight_view(function, "weight", args.weight);
  return {.dy = {args.dy, args.m, weight.rows, args.dy_row_stride, dtype, weight.device},
          .weight = weight,
          .dx = {args.dx, args.m, weight.cols, args.dx_row_stride, dtype, weight.device}};
}

GroupedMatmulArgs to_args(const char* function, const qn_grouped_matmul_args* given) {
  const qn_grouped_matmul_args args = read_struct(function, "args", given);
  const DType dtype = to_dtype(function, args.dtype);
  check_alignment(function, "x", args.x, size_bytes(dtype));
  check_alignment(function, "bias", args.bias, size_bytes(dtype));
  check_alignment(function, "y", args.y, size_bytes(dtype));
  const QuantizedStackView stack = to_stack(function, args.weights);
  const QuantizedView& first = stack.first;
  return {.x = {args.x, args.m, first.cols, args.x_row_stride, dtype, first.device},
          .ends = to_ends(function, args.group_ends, args.index_type, stack),
          .weights = stack,
          .bias = {args.bias, stack.count, first.rows, args.bias_row_stride, dtype, first.device},
          .y = {args.y, args.m, first.rows, args.y_row_stride, dtype, first.device}};
}

GroupedMatmulTransposedArgs to_args(const char* function,
                                    const qn_grouped_matmul_transposed_args* given) {
  const qn_grouped_matmul_transposed_args args = read_struct(function, "args", given);
  const DType dtype = to_dtype(function, args.dtype);
  check_alignment(function, "dy", args.dy, size_bytes(dtype));
  check_alignment(function, "dx", args.dx, size_bytes(dtype));
  const QuantizedStackView stack = to_stack(function, args.weights);
  const QuantizedView& first = stack.first;
  return {.dy = {args.dy, args.m, first.rows, args.dy_row_stride, dtype, first.device},
          .ends = to_ends(function, args.group_ends, args.index_type, stack),
          .weights = stack,
          .dx = {args.dx, args.m, first.cols, args.dx_row_stride, dtype, first.device}};
}

Workspace to_workspace(const char* function, void* data, int64_t size_bytes) {
  if (size_bytes < 0 || (data == nullptr && size_bytes > 0)) {
    fail(function, "the workspace has " + std::to_string(size_bytes) + " bytes" +
                       (data == nullptr ? " at a null address" : ""));
  }
  check_alignment(function, "the workspace", data, QN_WORKSPACE_ALIGNMENT);
  return {data, size_bytes};
}

}  // namespace qlora_native::c_api
