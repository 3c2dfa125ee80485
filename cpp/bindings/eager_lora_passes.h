// The passes of an adapter over a big matrix: by torch's products, or by the core where it drops or
// its kernel is forced.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "eager_products.h"
#include "qlora_native/lora.h"
#include "torch_eager.h"

/// A matrix as torch and as the core have it.
struct EagerMatrix {
  nanobind::object tensor;
  qlora_native::MatrixView view;

  /// Rows like those of `rows`, of `cols` elements, that are yet to be allocated: to be asked about.
  static EagerMatrix without_memory(const qlora_native::MatrixView& rows, int64_t cols);

  /// Of a tensor of ours.
  qlora_native::MutableMatrixView writable() const;
};

class EagerLoraPasses {
 public:
  EagerLoraPasses(Torch& torch, EagerProducts& products) : torch_(torch), products_(products) {}

  /// scaling D(x) factor^T, or scaling D(x) factor, as a new matrix. `like` looks as it will, or is
  /// None. Invalid when there is no memory.
  EagerMatrix project(const EagerMatrix& x, const EagerMatrix& factor, bool transposed,
                      float scaling, const qlora_native::Dropout& dropout, nanobind::handle like);
  /// The same into t. False when there is no memory.
  bool project_into(const EagerMatrix& x, const EagerMatrix& factor, bool transposed, float scaling,
                    const qlora_native::Dropout& dropout, const EagerMatrix& t);

  /// y += D(scaling t factor^T), or D(scaling t factor). False when there is no memory.
  bool update(const EagerMatrix& t, const EagerMatrix& factor, bool transposed, float scaling,
              const qlora_native::Dropout& dropout, const EagerMatrix& y);
  /// Whether `update` is a product of torch, which could be written instead of added.
  static bool update_is_dense(const EagerMatrix& t, const EagerMatrix& factor, bool transposed,
                              float scaling, const qlora_native::Dropout& dropout,
                              const EagerMatrix& y);
  /// y = start + scaling t factor^T, or scaling t factor, by torch. `start` is y, a row, or None.
  void add_low_rank(nanobind::handle start, const EagerMatrix& t, const EagerMatrix& factor,
                    bool transposed, float scaling, const EagerMatrix& y) const;

  /// scaling s^T D(v), or its transpose, of `dtype`; `looks` is a matrix of its shape and v's
  /// dtype, or None. None when there is no memory.
  nanobind::object gradient(const EagerMatrix& s, const EagerMatrix& v, bool transposed,
                            float scaling, const qlora_native::Dropout& dropout,
                            qlora_native::DType dtype, nanobind::handle looks);

  /// A new contiguous matrix on the device and of the dtype of `like`.
  EagerMatrix new_matrix(int64_t rows, int64_t cols, const qlora_native::MatrixView& like);
  nanobind::object factor_for_torch(const EagerMatrix& factor, qlora_native::DType dtype,
                                    bool transposed) const;

 private:
  Torch& torch_;
  EagerProducts& products_;
};
