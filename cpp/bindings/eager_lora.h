// Layers with adapters over one input, forward and backward, as an autograd Function's two calls:
// what nothing of torch has to see is read, multiplied and added up in one function each.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "eager_arguments.h"
#include "eager_lora_passes.h"
#include "eager_products.h"
#include "qlora_native/lora.h"
#include "torch_eager.h"

class EagerLora {
 public:
  EagerLora(Torch& torch, EagerProducts& products)
      : torch_(torch), products_(products), passes_(torch, products) {}

  /// The objects that make up a group of layers: for each its bias or None, A, B, and a tuple of
  /// the scaling and the weight, itself a tuple (`read_weight_tuple`).
  static constexpr Py_ssize_t kPerLayer = 4;

  /// A tuple of y of every layer, [..., out_features], and t = D(x) A^T of all, [M, sum of ranks].
  nanobind::object forward(nanobind::handle x, const qlora_native::Dropout& dropout,
                           nanobind::handle layers);

  /// The gradients of `forward` in the order of its arguments: dx, two for the dropout's seed and
  /// probability, those of `layers`; None where `wanted`, in the same order, is false. `dy` is a
  /// tuple; x and t may be None where no A, or no B, is wanted.
  nanobind::object backward(nanobind::handle dy, nanobind::handle x, nanobind::handle t,
                            const qlora_native::Dropout& dropout, nanobind::handle layers,
                            nanobind::handle wanted);

 private:
  using Matrix = EagerMatrix;

  struct Layer {
    nanobind::handle bias;
    Matrix a, b;
    float scaling;
    EagerWeight weight;
    int64_t first_rank;  ///< its first column of t
    qlora_native::DType dtype_of_b;
    bool is_dense = false;  ///< the pass's big product is torch's, over the decoded weight
  };

  bool read_layers(nanobind::handle objects, std::vector<Layer>* out) const;
  bool read_factors(qlora_native::DType dtype, std::vector<Layer>* layers) const;
  void cast_b(qlora_native::DType dtype, std::vector<Layer>* layers) const;
  Matrix all_a(const std::vector<Layer>& layers, qlora_native::DType dtype) const;

  Matrix columns(const Matrix& t, const Layer& layer) const;

  bool plan_outputs(const qlora_native::MatrixView& x, std::vector<Layer>* layers) const;
  bool plan_input_gradient(const std::vector<Matrix>& dy, std::vector<Layer>* layers) const;
  nanobind::object output(nanobind::handle x, const dlpack::Tensor& described, const Matrix& rows,
                          const Matrix& t, const Layer& layer);
  nanobind::object input_gradient(nanobind::handle first_dy, const std::vector<Matrix>& dy,
                                  const Matrix& u, const qlora_native::Dropout& dropout,
                                  const std::vector<Layer>& layers);

  Matrix gradient_of_t(const std::vector<Matrix>& gradients, const std::vector<Layer>& layers,
                       nanobind::handle like, int64_t ranks);
  bool set_da(const Matrix& u, const Matrix& x, const qlora_native::Dropout& dropout,
              const std::vector<Layer>& layers, nanobind::handle wanted, nanobind::list* results);

  Torch& torch_;
  EagerProducts& products_;
  EagerLoraPasses passes_;
};
