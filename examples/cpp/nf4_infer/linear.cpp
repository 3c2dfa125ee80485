#include "linear.h"

#include <qlora_native/matmul.h>

namespace llama {

namespace qn = qlora_native;

Weight load_weight(const Weights& weights, const std::string& name, int64_t rows, int64_t cols) {
  if (qn::QuantizedMatrix::is_in(weights.files, name)) {
    return qn::QuantizedMatrix::load(weights.files, name, weights.quantization,
                                     qn::MatrixShape{rows, cols});
  }
  return DenseMatrix(weights.files, name, rows, cols);
}

qn::Workspace Scratch::get(int64_t size_bytes) {
  const auto needed = static_cast<size_t>(size_bytes + kAlignment);
  if (memory_.size() < needed) memory_.resize(needed);
  void* aligned = memory_.data();
  size_t room = memory_.size();
  std::align(kAlignment, static_cast<size_t>(size_bytes), aligned, room);
  return {aligned, static_cast<int64_t>(room)};
}

Linear::Linear(const Weights& weights, const std::string& name, int64_t inputs, int64_t outputs)
    : outputs_(outputs), weight_(load_weight(weights, name + ".weight", outputs, inputs)) {
  if (weights.files.find(name + ".bias") != nullptr) {
    bias_ = load_vector(weights.files, name + ".bias", outputs);
  }
}

Matrix Linear::forward(const Matrix& x, Scratch& scratch) const {
  Matrix y(x.rows, outputs_);
  if (const auto* dense = std::get_if<DenseMatrix>(&weight_)) {
    dense->multiply(x, y);
    if (bias_.empty()) return y;
    for (int64_t row = 0; row < y.rows; ++row) {
      for (int64_t n = 0; n < outputs_; ++n) y.row(row)[n] += bias_[static_cast<size_t>(n)];
    }
    return y;
  }
  // Everything the operation touches is in its arguments: it allocates nothing, and chooses the
  // fastest kernel for this processor and number of rows.
  qn::MatmulArgs args{
      .x = x.view(),
      .weight = std::get<qn::QuantizedMatrix>(weight_).view(),
      .bias = {},
      .y = y.view(),
  };
  if (!bias_.empty()) args.bias = {bias_.data(), outputs_, qn::DType::kFloat32, {}};
  const qn::Workspace workspace = scratch.get(qn::matmul_4bit_workspace_bytes(args));
  qn::matmul_4bit(args, workspace, qn::Stream::none());
  return y;
}

}  // namespace llama
