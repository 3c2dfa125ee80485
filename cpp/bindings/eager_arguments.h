// Python's arguments of an eager call as the core's. Each function says whether the arguments are of
// the ordinary kind: right, and laid out as the kernels take them. Others are left to the torch
// operator, so nothing here words an error.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
#include <span>

#include "dlpack.h"
#include "qlora_native/dtype.h"
#include "qlora_native/quantized.h"
#include "qlora_native/views.h"
#include "torch_eager.h"

/// A tensor's shape, of few dimensions.
struct Shape {
  static constexpr size_t kMaxDims = 8;
  std::array<int64_t, kMaxDims> sizes;
  size_t ndim = 0;

  std::span<const int64_t> span() const { return {sizes.data(), ndim}; }
};

/// The Python objects that make up a 4-bit weight, as every operator takes them.
struct WeightObjects {
  nanobind::handle packed, absmax, absmax2, offset, shape, block_size, quant_type, codebook;
};

/// A weight as the core takes it, on its device as torch has it.
struct EagerWeight {
  qlora_native::QuantizedView view;
  dlpack::Device device;
  Shape shape;
  std::array<nanobind::object, 3> owned;  ///< tensors that no caller holds during the call
};

bool read_weight(const Torch& torch, const WeightObjects& objects, EagerWeight* out);

/// A weight as one tuple: what `WeightObjects` names or, as nn.Linear4bit keeps it, (weight,
/// weight_absmax, weight_absmax2 or None, shape, block_size, quant_type, codebook).
bool read_weight_tuple(const Torch& torch, nanobind::handle objects, EagerWeight* out);

/// What nn.Linear4bit keeps: a dict of parameters whose fp32 parts are bytes, absmax2's with the
/// offset's at the end. Another thread may replace parameters during the call.
struct LayerObjects {
  nanobind::handle parameters, quant_type, codebook;
  int64_t rows, cols, block_size;
};

/// `*bias` is the layer's, or None.
bool read_layer(const Torch& torch, const LayerObjects& objects, EagerWeight* out,
                nanobind::object* bias);

/// Activations for `weight`: rows of `features` elements, at least two.
bool read_activation(const Torch& torch, nanobind::handle tensor, const EagerWeight& weight,
                     int64_t features, dlpack::Tensor* described, qlora_native::MatrixView* out);

/// A matrix of `rows` x `cols` elements of `dtype` beside `weight`, whose rows are contiguous.
bool read_matrix(const Torch& torch, nanobind::handle tensor, const EagerWeight& weight,
                 qlora_native::DType dtype, int64_t rows, int64_t cols,
                 qlora_native::MatrixView* out);

/// A bias for `weight` of the dtype of `x`. None gives none.
bool read_bias(const Torch& torch, nanobind::handle tensor, const EagerWeight& weight,
               qlora_native::DType dtype, qlora_native::VectorView* out);

/// An adapter's A [r, in_features] and B [out_features, r] for `weight`, of `dtype` or fp32.
bool read_adapter(const Torch& torch, nanobind::handle a, nanobind::handle b,
                  const EagerWeight& weight, qlora_native::DType dtype,
                  qlora_native::MatrixView* out_a, qlora_native::MatrixView* out_b);

/// `input`'s shape with another last dimension.
bool output_shape(const dlpack::Tensor& input, int64_t features, Shape* out);
