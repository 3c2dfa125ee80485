#include "eager_arguments.h"

#include <algorithm>
#include <limits>

#include "qlora_native/codebook.h"

namespace nb = nanobind;
namespace qn = qlora_native;

namespace {

constexpr dlpack::DataType kUint8{dlpack::kUint, 8, 1};
constexpr dlpack::DataType kFloat32{dlpack::kFloat, 32, 1};
constexpr int64_t kFloatBytes = sizeof(float);

/// An int from 0 on.
bool read_size(nb::handle object, int64_t* out) {
  if (!PyLong_Check(object.ptr())) return false;
  *out = PyLong_AsLongLong(object.ptr());
  if (*out >= 0) return true;
  PyErr_Clear();
  return false;
}

/// As many elements as 64 bits count, with room for their bytes.
bool multiply(int64_t factor, int64_t* product) {
  if (factor > 0 && *product > std::numeric_limits<int64_t>::max() / 8 / factor) return false;
  *product *= factor;
  return true;
}

bool read_shape(nb::handle object, Shape* out) {
  if (!PyTuple_Check(object.ptr())) return false;
  const auto ndim = static_cast<size_t>(PyTuple_Size(object.ptr()));
  if (ndim > Shape::kMaxDims) return false;
  for (; out->ndim < ndim; ++out->ndim) {
    const nb::handle size = PyTuple_GetItem(object.ptr(), static_cast<Py_ssize_t>(out->ndim));
    if (!read_size(size, &out->sizes[out->ndim])) return false;
  }
  return true;
}

/// A matrix of that shape; of any other than two dimensions, one row.
bool set_shape(const Shape& shape, int64_t block_size, EagerWeight* out) {
  int64_t numel = 1;
  for (const int64_t size : shape.span()) {
    if (!multiply(size, &numel)) return false;
  }
  out->shape = shape;
  out->view.rows = shape.ndim == 2 ? shape.sizes[0] : 1;
  out->view.cols = shape.ndim == 2 ? shape.sizes[1] : numel;
  out->view.block_size = block_size;
  return qn::is_valid_block_size(block_size);
}

bool set_codebook(const Torch& torch, nb::handle quant_type, nb::handle values, EagerWeight* out) {
  nb::object owner;
  const qn::Codebook* const book = torch.codebook(quant_type, values, &owner);
  if (book == nullptr) return false;
  out->view.codebook = *book;
  return true;
}

/// A tensor of `count` contiguous elements; `*data` is where.
template <class T>
bool read_array(const Torch& torch, nb::handle tensor, dlpack::DataType dtype, int64_t count,
                dlpack::Device device, const T** data) {
  dlpack::Tensor described;
  if (!torch.describe(tensor, &described) || described.dtype != dtype ||
      described.device != device || numel(described) != count || !is_contiguous(described)) {
    return false;
  }
  *data = static_cast<const T*>(described.data);
  return true;
}

/// The packed codes decide on which device the weight is.
bool read_packed(const Torch& torch, nb::handle tensor, EagerWeight* out) {
  dlpack::Tensor described;
  if (!torch.describe(tensor, &described) || described.dtype != kUint8 ||
      numel(described) != qn::packed_bytes(out->view.numel()) || !is_contiguous(described)) {
    return false;
  }
  out->view.packed = static_cast<const uint8_t*>(described.data);
  out->device = described.device;
  out->view.device = device_of(described.device);
  return true;
}

/// A matrix on `device` whose rows are contiguous.
bool read_rows(const Torch& torch, nb::handle tensor, dlpack::Device device, qn::MatrixView* out) {
  dlpack::Tensor described;
  if (!torch.describe(tensor, &described) || !float_dtype_of(described.dtype, &out->dtype) ||
      described.device != device || described.ndim != 2 || torch.is_negated(tensor)) {
    return false;
  }
  const int64_t rows = described.shape[0];
  const int64_t cols = described.shape[1];
  if (cols > 1 && described.strides[1] != 1) return false;
  out->data = described.data;
  out->rows = rows;
  out->cols = cols;
  out->row_stride = rows > 1 ? described.strides[0] : cols;
  out->device = device_of(device);
  return out->row_stride >= cols;
}

/// A matrix beside `weight` whose rows are contiguous, of `dtype` or fp32.
bool read_factor(const Torch& torch, nb::handle tensor, const EagerWeight& weight, qn::DType dtype,
                 qn::MatrixView* out) {
  return read_rows(torch, tensor, weight.device, out) &&
         (out->dtype == dtype || out->dtype == qn::DType::kFloat32);
}

/// fp32 values kept as bytes.
bool read_raw_floats(const Torch& torch, nb::handle tensor, int64_t count, dlpack::Device device,
                     const float** data) {
  const uint8_t* bytes = nullptr;
  if (!read_array(torch, tensor, kUint8, kFloatBytes * count, device, &bytes)) return false;
  *data = reinterpret_cast<const float*>(bytes);
  return reinterpret_cast<uintptr_t>(bytes) % alignof(float) == 0;
}

/// The parts of a weight of known shape as nn.Linear4bit keeps them.
bool read_raw_parts(const Torch& torch, nb::handle packed, nb::handle absmax_object,
                    nb::handle absmax2_object, EagerWeight* out) {
  if (!read_packed(torch, packed, out)) return false;
  const int64_t blocks = qn::num_blocks(out->view.numel(), out->view.block_size);
  const int64_t groups = qn::num_groups(blocks);
  qn::Absmax& absmax = out->view.absmax;
  const dlpack::Device device = out->device;
  if (absmax2_object.is_none()) {
    return read_raw_floats(torch, absmax_object, blocks, device, &absmax.values);
  }
  if (!read_array(torch, absmax_object, kUint8, blocks, device, &absmax.codes) ||
      !read_raw_floats(torch, absmax2_object, groups + 1, device, &absmax.absmax2)) {
    return false;
  }
  absmax.offset = absmax.absmax2 + groups;
  return true;
}

}  // namespace

bool read_weight(const Torch& torch, const WeightObjects& objects, EagerWeight* out) {
  Shape shape;
  int64_t block_size = 0;
  if (!read_shape(objects.shape, &shape) || !read_size(objects.block_size, &block_size) ||
      !set_shape(shape, block_size, out) || !read_packed(torch, objects.packed, out) ||
      objects.absmax2.is_none() != objects.offset.is_none()) {
    return false;
  }
  const int64_t blocks = qn::num_blocks(out->view.numel(), block_size);
  qn::Absmax& absmax = out->view.absmax;
  const dlpack::Device device = out->device;
  const bool is_read =
      objects.offset.is_none()
          ? read_array(torch, objects.absmax, kFloat32, blocks, device, &absmax.values)
          : read_array(torch, objects.absmax, kUint8, blocks, device, &absmax.codes) &&
                read_array(torch, objects.absmax2, kFloat32, qn::num_groups(blocks), device,
                           &absmax.absmax2) &&
                read_array(torch, objects.offset, kFloat32, 1, device, &absmax.offset);
  return is_read && set_codebook(torch, objects.quant_type, objects.codebook, out);
}

bool read_layer(const Torch& torch, const LayerObjects& objects, EagerWeight* out,
                nb::object* bias) {
  const auto parameter = [&](const Torch::Name name) {
    return nb::borrow(PyDict_GetItemWithError(objects.parameters.ptr(), torch.name(name)));
  };
  out->owned = {parameter(Torch::Name::kWeight), parameter(Torch::Name::kWeightAbsmax),
                parameter(Torch::Name::kWeightAbsmax2)};
  *bias = parameter(Torch::Name::kBias);
  // A missing parameter is elsewhere: computed from others, say.
  if (!out->owned[0] || !out->owned[1] || !out->owned[2] || !*bias) return false;
  if (objects.rows < 0 || objects.cols < 0 ||
      !set_shape({{objects.rows, objects.cols}, 2}, objects.block_size, out)) {
    return false;
  }
  return read_raw_parts(torch, out->owned[0], out->owned[1], out->owned[2], out) &&
         set_codebook(torch, objects.quant_type, objects.codebook, out);
}

bool read_weight_tuple(const Torch& torch, nb::handle objects, EagerWeight* out) {
  if (!PyTuple_Check(objects.ptr())) return false;
  const Py_ssize_t count = PyTuple_Size(objects.ptr());
  const auto item = [&](Py_ssize_t i) { return nb::handle(PyTuple_GetItem(objects.ptr(), i)); };
  if (count == 8) {
    return read_weight(
        torch, {item(0), item(1), item(2), item(3), item(4), item(5), item(6), item(7)}, out);
  }
  Shape shape;
  int64_t block_size = 0;
  return count == 7 && read_shape(item(3), &shape) && read_size(item(4), &block_size) &&
         set_shape(shape, block_size, out) &&
         read_raw_parts(torch, item(0), item(1), item(2), out) &&
         set_codebook(torch, item(5), item(6), out);
}

bool read_activation(const Torch& torch, nb::handle tensor, const EagerWeight& weight,
                     int64_t features, dlpack::Tensor* described, qn::MatrixView* out) {
  if (!torch.describe(tensor, described) || !float_dtype_of(described->dtype, &out->dtype) ||
      described->device != weight.device || described->ndim == 0) {
    return false;
  }
  const int last = described->ndim - 1;
  const int64_t* const sizes = described->shape;
  const int64_t* const strides = described->strides;
  // A lone column's stride says nothing about its layout: not worth a rule of its own.
  if (sizes[last] != features || features < 2 || strides[last] != 1) return false;
  int64_t rows = 1;
  int64_t row_stride = features;
  for (int i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (rows == 1) {
      row_stride = strides[i];
    } else if (strides[i] != rows * row_stride) {
      return false;
    }
    rows *= sizes[i];
  }
  if (rows == 0 || row_stride < features || torch.is_negated(tensor)) return false;
  out->data = described->data;
  out->rows = rows;
  out->cols = features;
  out->row_stride = row_stride;
  out->device = weight.view.device;
  return true;
}

bool read_matrix(const Torch& torch, nb::handle tensor, const EagerWeight& weight, qn::DType dtype,
                 int64_t rows, int64_t cols, qn::MatrixView* out) {
  return read_rows(torch, tensor, weight.device, out) && out->dtype == dtype && out->rows == rows &&
         out->cols == cols;
}

bool read_bias(const Torch& torch, nb::handle tensor, const EagerWeight& weight, qn::DType dtype,
               qn::VectorView* out) {
  if (tensor.is_none()) return true;
  dlpack::Tensor described;
  if (!torch.describe(tensor, &described) || !float_dtype_of(described.dtype, &out->dtype) ||
      out->dtype != dtype || described.device != weight.device || described.ndim != 1 ||
      described.shape[0] != weight.view.rows || described.strides[0] != 1 ||
      torch.is_negated(tensor)) {
    return false;
  }
  out->data = described.data;
  out->size = weight.view.rows;
  out->device = weight.view.device;
  return true;
}

bool read_adapter(const Torch& torch, nb::handle a, nb::handle b, const EagerWeight& weight,
                  qn::DType dtype, qn::MatrixView* out_a, qn::MatrixView* out_b) {
  return read_factor(torch, a, weight, dtype, out_a) &&
         read_factor(torch, b, weight, dtype, out_b) && out_a->cols == weight.view.cols &&
         out_b->rows == weight.view.rows && out_a->rows == out_b->cols && out_a->rows > 0;
}

bool output_shape(const dlpack::Tensor& input, int64_t features, Shape* out) {
  if (static_cast<size_t>(input.ndim) > Shape::kMaxDims) return false;
  out->ndim = static_cast<size_t>(input.ndim);
  std::copy_n(input.shape, input.ndim - 1, out->sizes.begin());
  out->sizes[out->ndim - 1] = features;
  return true;
}
