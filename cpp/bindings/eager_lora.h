// Layers with adapters over one input, forward and backward, as an autograd Function's two calls:
// what nothing of torch has to see is read, multiplied and added up in one function each.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "eager_arguments.h"
#include "eager_products.h"
#include "qlora_native/lora.h"
#include "torch_eager.h"

class EagerLora {
 public:
  EagerLora(Torch& torch, EagerProducts& products) : torch_(torch), products_(products) {}

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
  /// A matrix as torch and as the core have it.
  struct Matrix {
    nanobind::object tensor;
    qlora_native::MatrixView view;
  };

  struct Layer {
    nanobind::handle bias;
    Matrix a, b;
    float scaling;
    EagerWeight weight;
    int64_t first_rank;  ///< its first column of t
    qlora_native::DType dtype_of_b;
  };

  bool read_layers(nanobind::handle objects, std::vector<Layer>* out) const;
  bool read_factors(qlora_native::DType dtype, std::vector<Layer>* layers) const;
  void cast_b(qlora_native::DType dtype, std::vector<Layer>* layers) const;
  Matrix all_a(const std::vector<Layer>& layers, qlora_native::DType dtype) const;

  Matrix new_matrix(int64_t rows, int64_t cols, const qlora_native::MatrixView& like);
  Matrix columns(const Matrix& t, const Layer& layer) const;

  // The passes, by torch's products or by the core. False when there is no memory.
  Matrix project(const Matrix& x, const Matrix& factor, bool transposed, float scaling,
                 const qlora_native::Dropout& dropout, nanobind::handle like);
  bool project_into(const Matrix& x, const Matrix& factor, bool transposed, float scaling,
                    const qlora_native::Dropout& dropout, const Matrix& t);
  Matrix gradient_of_t(const std::vector<Matrix>& gradients, const std::vector<Layer>& layers,
                       nanobind::handle like, int64_t ranks);
  bool update(const Matrix& t, const Matrix& factor, bool transposed, float scaling,
              const qlora_native::Dropout& dropout, const Matrix& y);
  nanobind::object gradient(const Matrix& s, const Matrix& v, bool transposed, float scaling,
                            const qlora_native::Dropout& dropout, qlora_native::DType dtype,
                            nanobind::handle looks);
  nanobind::object factor_for_torch(const Matrix& factor, qlora_native::DType dtype,
                                    bool transposed) const;

  bool set_da(const Matrix& u, const Matrix& x, const qlora_native::Dropout& dropout,
              const std::vector<Layer>& layers, nanobind::handle wanted, nanobind::list* results);

  Torch& torch_;
  EagerProducts& products_;
};
