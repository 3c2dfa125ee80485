// Products of groups for the tests: arguments, fp64 references, and runs on a device.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "support/problem.h"

namespace qlora_native::testing {

/// What the library is asked for.
struct Grouped {
  WeightSpec weight;           ///< of every matrix
  std::vector<int64_t> sizes;  ///< rows of each group
  DType dtype = DType::kFloat32;
  bool transposed = false;
  bool has_bias = false;
  int64_t rows_of_none = 0;  ///< rows after those of the last group
  int64_t padding = 0;       ///< elements between rows, and between the parts of matrices
  IndexType index_type = IndexType::kInt64;

  int64_t groups() const { return static_cast<int64_t>(sizes.size()); }
  int64_t m() const {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) + rows_of_none;
  }
  int64_t depth() const { return transposed ? weight.rows : weight.cols; }
  int64_t columns() const { return transposed ? weight.cols : weight.rows; }
  Op op() const { return transposed ? Op::kGroupedMatmul4bitTransposed : Op::kGroupedMatmul4bit; }
  std::vector<int64_t> ends() const {
    std::vector<int64_t> ends(sizes.size());
    std::partial_sum(sizes.begin(), sizes.end(), ends.begin());
    return ends;
  }
};

struct Inputs {
  std::vector<HostWeight> weights;
  std::vector<double> a;     ///< [m, depth]
  std::vector<double> bias;  ///< [groups, columns] or empty
  std::vector<int64_t> ends;
};

struct Reference {
  std::vector<double> exact;       ///< fp64 product of the fp32 weights
  std::vector<double> magnitude;   ///< the same of the absolute values
  std::vector<double> from_dtype;  ///< with weights rounded to dtype, rounded to dtype
};

Inputs make_inputs(const Grouped& g, uint32_t seed);
Reference multiply(const Grouped& g, const Inputs& inputs);

/// Runs the operation; returns out, dense, having checked that nothing else was written.
std::vector<double> run_on(Device device, const Grouped& g, const Inputs& inputs);

/// Within the error of fp32 sums and one rounding and, over all, no worse than weights rounded to dtype.
void expect_accurate(const Grouped& g, const Reference& r, const std::vector<double>& actual,
                     Device device);

}  // namespace qlora_native::testing
