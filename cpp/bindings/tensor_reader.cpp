#include "tensor_reader.h"

#include <nanobind/stl/string.h>

#include <string>
#include <utility>

#include "torch_eager.h"

namespace nb = nanobind;
namespace qn = qlora_native;

TensorReader::TensorReader(nb::handle exchange_api, nb::sequence dtypes, nb::object current_stream)
    : api_(find_exchange_api(exchange_api)), current_stream_(std::move(current_stream)) {
  for (size_t i = 0; i < dtypes_.size(); ++i) dtypes_[i] = dtypes[i];
}

bool TensorReader::read(nb::handle tensor, TensorFacts* out) const {
  if (api_ == nullptr) return read_attributes(tensor, out);
  dlpack::Tensor described;
  if (api_->describe(tensor.ptr(), &described) != 0) {
    PyErr_Clear();
    return false;
  }
  if (described.device.type != dlpack::kCpu && described.device.type != dlpack::kCuda) return false;
  *out = {};
  out->numel = numel(described);
  if (described.data == nullptr && out->numel > 0) return false;
  out->data = static_cast<char*>(described.data) + described.byte_offset;
  out->device = device_of(described.device);
  out->is_contiguous = out->numel == 0 || is_contiguous(described);
  out->is_float = float_dtype_of(described.dtype, &out->dtype);
  out->is_uint8 = described.dtype == dlpack::DataType{dlpack::kUint, 8, 1};
  return true;
}

bool TensorReader::read_attributes(nb::handle tensor, TensorFacts* out) const {
  try {
    const nb::object device = tensor.attr("device");
    const auto type = nb::cast<std::string>(device.attr("type"));
    if ((type != "cpu" && type != "cuda") || nb::cast<bool>(tensor.attr("is_sparse"))) return false;
    *out = {};
    out->device = type == "cpu" ? qn::Device::cpu()
                                : qn::Device::cuda(nb::cast<int32_t>(device.attr("index")));
    out->numel = nb::cast<int64_t>(tensor.attr("numel")());
    out->data = reinterpret_cast<void*>(nb::cast<uintptr_t>(tensor.attr("data_ptr")()));
    out->is_contiguous = nb::cast<bool>(tensor.attr("is_contiguous")());
    const nb::object dtype = tensor.attr("dtype");
    for (size_t i = 0; i < 3; ++i) {
      if (!dtype.is(dtypes_[i])) continue;
      out->is_float = true;
      out->dtype = static_cast<qn::DType>(i);
    }
    out->is_uint8 = dtype.is(dtypes_[3]);
    return true;
  } catch (nb::python_error&) {
    return false;
  }
}

qn::Stream TensorReader::current_stream(qn::Device device) const {
  if (device.is_cpu()) return qn::Stream::none();
  void* handle = nullptr;
  if (api_ == nullptr) {
    handle = reinterpret_cast<void*>(nb::cast<uintptr_t>(current_stream_(device.index)));
  } else if (api_->current_stream(dlpack::kCuda, device.index, &handle) != 0) {
    nb::raise_python_error();
  }
  return qn::Stream::from_handle(handle);
}
