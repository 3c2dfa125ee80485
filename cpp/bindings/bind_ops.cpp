// The operations, over addresses. Every argument is keyword-only: an address in the wrong place
// would be a silent disaster. The Python layer has checked shapes, dtypes and devices and keeps the
// tensors alive during the call; the library checks again what it can see.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "bindings.h"
#include "core_arguments.h"
#include "qlora_native/codebook.h"
#include "qlora_native/dequantize.h"
#include "qlora_native/error.h"
#include "qlora_native/grouped_matmul.h"
#include "qlora_native/matmul.h"
#include "qlora_native/quantize.h"

namespace nb = nanobind;
namespace qn = qlora_native;
using namespace nb::literals;

namespace {

qn::Codebook named_codebook(const std::string& quant_type) {
  for (const qn::Codebook& book : {qn::kNF4, qn::kFP4, qn::kINT4}) {
    if (quant_type == qn::name(book.type)) return book;
  }
  throw qn::InvalidArgument("unknown quant_type '" + quant_type +
                            "'; known are nf4, fp4, int4 and, with a codebook, custom");
}

qn::Codebook custom_codebook(const std::array<float, 16>& values) {
  float raw[16];
  std::copy(values.begin(), values.end(), raw);
  return qn::make_custom_codebook(raw);
}

/// Where the parts of a 4-bit weight lie; what every operation takes. Made for one call: it owns
/// nothing.
qn::MutableQuantizedView weight_view(uintptr_t packed, uintptr_t absmax, uintptr_t absmax2,
                                     uintptr_t offset, bool double_quant, int64_t rows,
                                     int64_t cols, int64_t block_size, const qn::Codebook& codebook,
                                     int device) {
  qn::MutableQuantizedView view{.packed = pointer<uint8_t>(packed),
                                .absmax = {},
                                .rows = rows,
                                .cols = cols,
                                .block_size = block_size,
                                .codebook = codebook,
                                .device = device_of(device)};
  if (double_quant) {
    // A tensor without elements has no address; any but null says "double-quantized".
    static uint8_t no_codes = 0;
    view.absmax.codes = absmax ? pointer<uint8_t>(absmax) : &no_codes;
    view.absmax.absmax2 = pointer<float>(absmax2);
    view.absmax.offset = pointer<float>(offset);
  } else {
    view.absmax.values = pointer<float>(absmax);
  }
  return view;
}

qn::QuantizeArgs quantize_args(const qn::MutableQuantizedView& weight, uintptr_t input, int dtype,
                               uintptr_t pinned_offset) {
  return {.input = {pointer(input), weight.numel(), static_cast<qn::DType>(dtype), weight.device},
          .output = weight,
          .pinned_offset = pointer<const float>(pinned_offset)};
}

qn::MatmulArgs matmul_args(const qn::MutableQuantizedView& weight, uintptr_t x, int64_t m,
                           int64_t row_stride, int dtype, uintptr_t bias, uintptr_t y) {
  const auto type = static_cast<qn::DType>(dtype);
  return {.x = {pointer(x), m, weight.cols, row_stride, type, weight.device},
          .weight = read_only(weight),
          .bias = {pointer(bias), weight.rows, type, weight.device},
          .y = {pointer(y), m, weight.rows, weight.rows, type, weight.device}};
}

qn::MatmulTransposedArgs matmul_transposed_args(const qn::MutableQuantizedView& weight,
                                                uintptr_t dy, int64_t m, int64_t row_stride,
                                                int dtype, uintptr_t dx) {
  const auto type = static_cast<qn::DType>(dtype);
  return {.dy = {pointer(dy), m, weight.rows, row_stride, type, weight.device},
          .weight = read_only(weight),
          .dx = {pointer(dx), m, weight.cols, weight.cols, type, weight.device}};
}

/// Matrices of the shape and format of `first`; strides in elements of a part.
qn::QuantizedStackView stack_view(const qn::MutableQuantizedView& first, int64_t count,
                                  int64_t packed_stride, int64_t absmax_stride,
                                  int64_t absmax2_stride, int64_t offset_stride) {
  return {.first = read_only(first),
          .count = count,
          .packed_stride = packed_stride,
          .absmax_stride = absmax_stride,
          .absmax2_stride = absmax2_stride,
          .offset_stride = offset_stride};
}

qn::GroupEnds group_ends(const qn::QuantizedStackView& weights, uintptr_t ends, int index_bytes) {
  return {pointer(ends), weights.count,
          index_bytes == 4 ? qn::IndexType::kInt32 : qn::IndexType::kInt64, weights.first.device};
}

qn::GroupedMatmulArgs grouped_args(const qn::QuantizedStackView& weights, uintptr_t x, int64_t m,
                                   int64_t row_stride, int dtype, uintptr_t ends, int index_bytes,
                                   uintptr_t bias, uintptr_t y) {
  const auto type = static_cast<qn::DType>(dtype);
  const qn::QuantizedView& w = weights.first;
  return {.x = {pointer(x), m, w.cols, row_stride, type, w.device},
          .ends = group_ends(weights, ends, index_bytes),
          .weights = weights,
          .bias = {pointer(bias), weights.count, w.rows, w.rows, type, w.device},
          .y = {pointer(y), m, w.rows, w.rows, type, w.device}};
}

qn::GroupedMatmulTransposedArgs grouped_transposed_args(const qn::QuantizedStackView& weights,
                                                        uintptr_t dy, int64_t m, int64_t row_stride,
                                                        int dtype, uintptr_t ends, int index_bytes,
                                                        uintptr_t dx) {
  const auto type = static_cast<qn::DType>(dtype);
  const qn::QuantizedView& w = weights.first;
  return {.dy = {pointer(dy), m, w.rows, row_stride, type, w.device},
          .ends = group_ends(weights, ends, index_bytes),
          .weights = weights,
          .dx = {pointer(dx), m, w.cols, w.cols, type, w.device}};
}

void bind_codebooks(nb::module_& m) {
  nb::class_<qn::Codebook>(m, "Codebook", "One 4-bit code: its values and decision points.")
      .def_prop_ro("quant_type",
                   [](const qn::Codebook& book) { return std::string(name(book.type)); })
      .def_prop_ro("values", [](const qn::Codebook& book) { return std::to_array(book.values); })
      .def_prop_ro("decision_points",
                   [](const qn::Codebook& book) { return std::to_array(book.decision_points); });
  m.def("named_codebook", &named_codebook, "quant_type"_a);
  m.def("custom_codebook", &custom_codebook, "values"_a);
  m.def("signed_dynamic_map", [] { return std::to_array(qn::kSignedDynamicMap.values); });
  m.def("unsigned_dynamic_map", [] { return std::to_array(qn::kUnsignedDynamicMap.values); });
  m.def("is_valid_block_size", &qn::is_valid_block_size, "block_size"_a);
  m.attr("GROUP_SIZE") = qn::kGroupSize;
}

void bind_grouped(nb::module_& m) {
  using Stack = qn::QuantizedStackView;
  const auto no_gil = nb::call_guard<nb::gil_scoped_release>();

  nb::class_<Stack>(m, "WeightStackView", "Addresses of the parts of many weights, for one call.")
      .def_static("make", &stack_view, nb::kw_only(), "first"_a, "count"_a, "packed_stride"_a,
                  "absmax_stride"_a, "absmax2_stride"_a, "offset_stride"_a);

  m.def(
      "grouped_matmul_4bit_plan",
      [](const Stack& weights, uintptr_t x, int64_t m, int64_t row_stride, int dtype,
         uintptr_t ends, int index_bytes, uintptr_t bias, uintptr_t y) {
        return plan_code(qn::grouped_matmul_4bit_plan(
            grouped_args(weights, x, m, row_stride, dtype, ends, index_bytes, bias, y)));
      },
      "weights"_a, nb::kw_only(), "x"_a, "m"_a, "row_stride"_a, "dtype"_a, "ends"_a,
      "index_bytes"_a, "bias"_a, "y"_a);
  m.def(
      "grouped_matmul_4bit",
      [](const Stack& weights, uintptr_t x, int64_t m, int64_t row_stride, int dtype,
         uintptr_t ends, int index_bytes, uintptr_t bias, uintptr_t y, uintptr_t workspace,
         int64_t workspace_bytes, uintptr_t stream) {
        qn::grouped_matmul_4bit(
            grouped_args(weights, x, m, row_stride, dtype, ends, index_bytes, bias, y),
            workspace_of(workspace, workspace_bytes), stream_of(stream));
      },
      "weights"_a, nb::kw_only(), "x"_a, "m"_a, "row_stride"_a, "dtype"_a, "ends"_a,
      "index_bytes"_a, "bias"_a, "y"_a, "workspace"_a, "workspace_bytes"_a, "stream"_a, no_gil);

  m.def(
      "grouped_matmul_4bit_transposed_plan",
      [](const Stack& weights, uintptr_t dy, int64_t m, int64_t row_stride, int dtype,
         uintptr_t ends, int index_bytes, uintptr_t dx) {
        return plan_code(qn::grouped_matmul_4bit_transposed_plan(
            grouped_transposed_args(weights, dy, m, row_stride, dtype, ends, index_bytes, dx)));
      },
      "weights"_a, nb::kw_only(), "dy"_a, "m"_a, "row_stride"_a, "dtype"_a, "ends"_a,
      "index_bytes"_a, "dx"_a);
  m.def(
      "grouped_matmul_4bit_transposed",
      [](const Stack& weights, uintptr_t dy, int64_t m, int64_t row_stride, int dtype,
         uintptr_t ends, int index_bytes, uintptr_t dx, uintptr_t workspace,
         int64_t workspace_bytes, uintptr_t stream) {
        qn::grouped_matmul_4bit_transposed(
            grouped_transposed_args(weights, dy, m, row_stride, dtype, ends, index_bytes, dx),
            workspace_of(workspace, workspace_bytes), stream_of(stream));
      },
      "weights"_a, nb::kw_only(), "dy"_a, "m"_a, "row_stride"_a, "dtype"_a, "ends"_a,
      "index_bytes"_a, "dx"_a, "workspace"_a, "workspace_bytes"_a, "stream"_a, no_gil);
}

}  // namespace

void bind_ops(nb::module_& m) {
  bind_codebooks(m);
  using Weight = qn::MutableQuantizedView;
  const auto no_gil = nb::call_guard<nb::gil_scoped_release>();

  nb::class_<Weight>(m, "WeightView", "Addresses of a 4-bit weight's parts, for one call.")
      .def_static("make", &weight_view, nb::kw_only(), "packed"_a, "absmax"_a, "absmax2"_a,
                  "offset"_a, "double_quant"_a, "rows"_a, "cols"_a, "block_size"_a, "codebook"_a,
                  "device"_a);

  m.def(
      "quantize_4bit_workspace_bytes",
      [](const Weight& weight, uintptr_t input, int dtype, uintptr_t pinned_offset) {
        return qn::quantize_4bit_workspace_bytes(
            quantize_args(weight, input, dtype, pinned_offset));
      },
      "weight"_a, nb::kw_only(), "input"_a, "dtype"_a, "pinned_offset"_a);
  m.def(
      "quantize_4bit",
      [](const Weight& weight, uintptr_t input, int dtype, uintptr_t pinned_offset,
         uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
        qn::quantize_4bit(quantize_args(weight, input, dtype, pinned_offset),
                          workspace_of(workspace, workspace_bytes), stream_of(stream));
      },
      "weight"_a, nb::kw_only(), "input"_a, "dtype"_a, "pinned_offset"_a, "workspace"_a,
      "workspace_bytes"_a, "stream"_a, no_gil);

  m.def(
      "dequantize_4bit",
      [](const Weight& weight, uintptr_t output, int dtype, uintptr_t stream) {
        qn::dequantize_4bit({.weight = read_only(weight),
                             .output = {pointer(output), weight.numel(),
                                        static_cast<qn::DType>(dtype), weight.device}},
                            stream_of(stream));
      },
      "weight"_a, nb::kw_only(), "output"_a, "dtype"_a, "stream"_a, no_gil);

  m.attr("PREFER_DENSE") = kPreferDense;
  m.def(
      "matmul_4bit_plan",
      [](const Weight& weight, uintptr_t x, int64_t m, int64_t row_stride, int dtype,
         uintptr_t bias, uintptr_t y) {
        const qn::MatmulArgs args = matmul_args(weight, x, m, row_stride, dtype, bias, y);
        return plan_code(qn::matmul_4bit_plan(args));
      },
      "weight"_a, nb::kw_only(), "x"_a, "m"_a, "row_stride"_a, "dtype"_a, "bias"_a, "y"_a);
  m.def(
      "matmul_4bit",
      [](const Weight& weight, uintptr_t x, int64_t m, int64_t row_stride, int dtype,
         uintptr_t bias, uintptr_t y, uintptr_t workspace, int64_t workspace_bytes,
         uintptr_t stream) {
        qn::matmul_4bit(matmul_args(weight, x, m, row_stride, dtype, bias, y),
                        workspace_of(workspace, workspace_bytes), stream_of(stream));
      },
      "weight"_a, nb::kw_only(), "x"_a, "m"_a, "row_stride"_a, "dtype"_a, "bias"_a, "y"_a,
      "workspace"_a, "workspace_bytes"_a, "stream"_a, no_gil);

  m.def(
      "matmul_4bit_transposed_plan",
      [](const Weight& weight, uintptr_t dy, int64_t m, int64_t row_stride, int dtype,
         uintptr_t dx) {
        const auto args = matmul_transposed_args(weight, dy, m, row_stride, dtype, dx);
        return plan_code(qn::matmul_4bit_transposed_plan(args));
      },
      "weight"_a, nb::kw_only(), "dy"_a, "m"_a, "row_stride"_a, "dtype"_a, "dx"_a);
  m.def(
      "matmul_4bit_transposed",
      [](const Weight& weight, uintptr_t dy, int64_t m, int64_t row_stride, int dtype, uintptr_t dx,
         uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
        qn::matmul_4bit_transposed(matmul_transposed_args(weight, dy, m, row_stride, dtype, dx),
                                   workspace_of(workspace, workspace_bytes), stream_of(stream));
      },
      "weight"_a, nb::kw_only(), "dy"_a, "m"_a, "row_stride"_a, "dtype"_a, "dx"_a, "workspace"_a,
      "workspace_bytes"_a, "stream"_a, no_gil);
  bind_grouped(m);
}
