// The adapters' operations from their definition, in fp64, and calls of the library's.
#pragma once

#include <iosfwd>
#include <vector>

#include "qlora_native/qlora_native.h"
#include "support/number_formats.h"

namespace qlora_native::testing {

/// One call of lora_project, lora_update or lora_gradient.
struct LoraProblem {
  Op op;
  int64_t m, r, c;
  bool transposed = false;  ///< the factor, or the gradient
  DType dtype = DType::kFloat32;
  DType parameter_dtype = DType::kFloat32;  ///< of the factor, or the gradient
  float scaling = 1.75f;
  Dropout dropout = {};
  int64_t low_padding = 0;        ///< elements between the rows of t or s
  int64_t high_padding = 0;       ///< of x, y or v
  int64_t parameter_padding = 0;  ///< of the factor or the gradient

  bool is_gradient() const { return op == Op::kLoraGradient; }
  DType out_dtype() const { return is_gradient() ? parameter_dtype : dtype; }
  /// The factor, or the gradient, as it is stored.
  int64_t parameter_rows() const;
  int64_t parameter_cols() const;
};

std::ostream& operator<<(std::ostream& out, const LoraProblem& p);

struct LoraInputs {
  std::vector<double> low;     ///< t or s [m, r]; of lora_project none
  std::vector<double> high;    ///< x or v [m, c], or what y [m, c] is before
  std::vector<double> factor;  ///< as it is stored; of lora_gradient none
};

/// Gaussian numbers of the dtypes of the arrays; NaN-free.
LoraInputs make_inputs(const LoraProblem& p, uint32_t seed);

/// Inputs under which the output is scaling * D(ones). r has to be m for lora_gradient, else c.
LoraInputs identity_inputs(const LoraProblem& p);

struct LoraReference {
  std::vector<double> exact;
  std::vector<double> tolerance;  ///< what fp32 sums may differ by, before the result is rounded
};

LoraReference reference(const LoraProblem& p, const LoraInputs& inputs);

/// Whether element (row, col) of a matrix of `cols` columns is kept, from the definition.
bool is_kept(const Dropout& dropout, int64_t cols, int64_t row, int64_t col);
/// What kept elements are multiplied by.
double dropout_scale(const Dropout& dropout);

/// Runs the operation; returns its output, dense, having checked that nothing else was written.
std::vector<double> run_on(Device device, const LoraProblem& p, const LoraInputs& inputs);

}  // namespace qlora_native::testing
