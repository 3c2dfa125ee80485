// Products of one matrix for the tests: arguments, inputs, and runs on a device.
#pragma once

#include <cstdint>
#include <vector>

#include "support/problem.h"

namespace qlora_native::testing {

/// A product out[M, C] = A[M, D] * B[D, C] (+ bias), as the library is asked for it.
struct Product {
  WeightSpec weight;
  int64_t m = 1;
  DType dtype = DType::kFloat32;
  bool transposed = false;  ///< B = W instead of W^T
  bool has_bias = false;
  int64_t a_padding = 0;    ///< elements between the rows of A
  int64_t out_padding = 0;  ///< elements between the rows of out

  int64_t depth() const { return transposed ? weight.rows : weight.cols; }
  int64_t columns() const { return transposed ? weight.cols : weight.rows; }
  Op op() const { return transposed ? Op::kMatmul4bitTransposed : Op::kMatmul4bit; }
};

struct ProductInputs {
  HostWeight weight;
  std::vector<double> a;     ///< [m, depth]
  std::vector<double> bias;  ///< [columns] or empty
};

ProductInputs make_product_inputs(const Product& p, uint32_t seed);

struct ProductRun {
  std::vector<uint8_t> out;     ///< [m, columns], dense, in the dtype
  int64_t workspace_bytes = 0;  ///< what the kernel asked for
};

/// Runs the product in a workspace that is full of the byte `in_workspace`, and checks that nothing but out and the
/// workspace was written.
ProductRun run_product_in(uint8_t in_workspace, Device device, const Product& p,
                          const ProductInputs& inputs);

/// The same in a workspace of NaN; returns out.
std::vector<double> run_product(Device device, const Product& p, const ProductInputs& inputs);

}  // namespace qlora_native::testing
