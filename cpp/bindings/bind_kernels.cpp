// List, force and query kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <utility>

#include "bindings.h"
#include "qlora_native/error.h"
#include "qlora_native/grouped_matmul.h"
#include "qlora_native/kernels.h"

namespace nb = nanobind;
namespace qn = qlora_native;

namespace {

qn::Op op_of(const std::string& op_name) {
  std::string known;
  for (const qn::Op op : qn::kAllOps) {
    if (op_name == qn::name(op)) return op;
    known += (known.empty() ? "" : ", ") + std::string(qn::name(op));
  }
  throw qn::InvalidArgument("no operation named '" + op_name + "'; there are: " + known);
}

qn::DeviceType device_type_of(const std::string& type_name) {
  for (const auto type : {qn::DeviceType::kCpu, qn::DeviceType::kCuda}) {
    if (type_name == qn::name(type)) return type;
  }
  throw qn::InvalidArgument("no device type named '" + type_name + "'; there are: cpu, cuda");
}

/// Answers for arrays that do not exist: contiguous, aligned ones of the given shape; for groups of
/// rows, for one group.
std::pair<std::string, bool> selected_kernel(const std::string& op_name, int64_t m, int64_t rows,
                                             int64_t cols, int dtype_code, int64_t block_size,
                                             bool double_quant, const qn::Codebook& codebook,
                                             int device_code) {
  alignas(256) static float nowhere[64];
  const auto dtype = static_cast<qn::DType>(dtype_code);
  const qn::Device device = device_code < 0 ? qn::Device::cpu() : qn::Device::cuda(device_code);
  auto* const bytes = reinterpret_cast<uint8_t*>(nowhere);
  const qn::MutableAbsmax absmax = double_quant
                                       ? qn::MutableAbsmax{nullptr, bytes, nowhere, nowhere}
                                       : qn::MutableAbsmax{.values = nowhere};
  const qn::Absmax read_absmax{absmax.values, absmax.codes, absmax.absmax2, absmax.offset};
  const qn::QuantizedView weight{bytes, read_absmax, rows, cols, block_size, codebook, device};
  switch (op_of(op_name)) {
    case qn::Op::kQuantize4bit:
      return {qn::selected_kernel(
                  qn::QuantizeArgs{{nowhere, rows * cols, dtype, device},
                                   {bytes, absmax, rows, cols, block_size, codebook, device}}),
              false};
    case qn::Op::kDequantize4bit:
      return {
          qn::selected_kernel(qn::DequantizeArgs{weight, {nowhere, rows * cols, dtype, device}}),
          false};
    case qn::Op::kMatmul4bit: {
      const qn::MatmulArgs args{{nowhere, m, cols, cols, dtype, device},
                                weight,
                                {},
                                {nowhere, m, rows, rows, dtype, device}};
      return {qn::selected_kernel(args), qn::matmul_4bit_plan(args).prefers_dense};
    }
    case qn::Op::kMatmul4bitTransposed: {
      const qn::MatmulTransposedArgs args{
          {nowhere, m, rows, rows, dtype, device}, weight, {nowhere, m, cols, cols, dtype, device}};
      return {qn::selected_kernel(args), qn::matmul_4bit_transposed_plan(args).prefers_dense};
    }
    case qn::Op::kGroupedMatmul4bit: {
      const qn::GroupedMatmulArgs args{{nowhere, m, cols, cols, dtype, device},
                                       {&m, 1, qn::IndexType::kInt64, device},
                                       {.first = weight, .count = 1},
                                       {},
                                       {nowhere, m, rows, rows, dtype, device}};
      return {qn::selected_kernel(args), qn::grouped_matmul_4bit_plan(args).prefers_dense};
    }
    case qn::Op::kGroupedMatmul4bitTransposed: {
      const qn::GroupedMatmulTransposedArgs args{{nowhere, m, rows, rows, dtype, device},
                                                 {&m, 1, qn::IndexType::kInt64, device},
                                                 {.first = weight, .count = 1},
                                                 {nowhere, m, cols, cols, dtype, device}};
      return {qn::selected_kernel(args),
              qn::grouped_matmul_4bit_transposed_plan(args).prefers_dense};
    }
    default:
      throw qn::InvalidArgument(op_name + " has no 4-bit weight whose shape would pick a kernel");
  }
}

}  // namespace

void bind_kernels(nb::module_& m) {
  nb::class_<qn::KernelInfo>(m, "KernelInfo", "A kernel of this build.")
      .def_prop_ro(
          "op", [](const qn::KernelInfo& info) { return std::string(qn::name(info.op)); },
          "The operation: \"quantize_4bit\", \"matmul_4bit\", ...")
      .def_prop_ro(
          "device", [](const qn::KernelInfo& info) { return std::string(qn::name(info.device)); },
          "\"cpu\" or \"cuda\".")
      .def_ro("name", &qn::KernelInfo::name, "Unique within an operation and a device.")
      .def_ro("usable", &qn::KernelInfo::usable, "Whether this machine's hardware can run it.")
      .def_ro("why_not", &qn::KernelInfo::why_not, "Why it is not usable, or an empty text.")
      .def("__repr__", [](const qn::KernelInfo& info) {
        return std::string("KernelInfo(") + qn::name(info.op) + ", " + qn::name(info.device) +
               ", " + info.name + (info.usable ? ")" : ", unusable: " + info.why_not + ")");
      });
  m.def("list_kernels", &qn::list_kernels);
  m.def(
      "force_kernel",
      [](const std::string& op, const std::string& device, const std::string& kernel) {
        qn::force_kernel(op_of(op), device_type_of(device), kernel);
      },
      nb::arg("op"), nb::arg("device"), nb::arg("kernel"));
  m.def(
      "forced_kernel",
      [](const std::string& op, const std::string& device) {
        return qn::forced_kernel(op_of(op), device_type_of(device));
      },
      nb::arg("op"), nb::arg("device"));
  m.def(
      "selected_kernel", &selected_kernel, nb::arg("op"), nb::kw_only(), nb::arg("m"),
      nb::arg("rows"), nb::arg("cols"), nb::arg("dtype"), nb::arg("block_size"),
      nb::arg("double_quant"), nb::arg("codebook"), nb::arg("device"),
      "The kernel for a problem of this shape, and whether a dense GEMM would be preferred to it.");
  m.def(
      "last_kernel", [](const std::string& op) { return qn::last_kernel(op_of(op)); },
      nb::arg("op"));
}
