// A weight and its activations on a machine, in as many copies as keep the caches cold.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "machine.h"
#include "qlora_native/qlora_native.h"
#include "shape.h"

namespace bench {

/// How a weight is quantized.
struct WeightFormat {
  qlora_native::QuantType quant_type = qlora_native::QuantType::kNF4;
  int64_t block_size = 64;
  bool double_quant = true;  ///< scales in 8 bits; else fp32
  friend bool operator==(const WeightFormat&, const WeightFormat&) = default;
};

/// The bytes of a 4-bit weight.
class QuantizedWeight {
 public:
  QuantizedWeight(Machine& machine, Shape shape, WeightFormat format);

  qlora_native::MutableQuantizedView mutable_view() const;
  qlora_native::QuantizedView view() const;
  int64_t size_bytes() const;

  /// Of the scales either `absmax`, or the three of the double quantization; the others are empty.
  Buffer packed, absmax, codes, absmax2, offset;

 private:
  Shape shape_;
  WeightFormat format_;
  qlora_native::Device device_;
};

/// Calls that do the same on different memory, and what one of them has to do.
struct Work {
  std::vector<std::function<void()>> calls;
  int64_t bytes_per_call = 0;
  int64_t weight_bytes_per_call = 0;  ///< those of the 4-bit weight among them
  int64_t flops_per_call = 0;
  std::string kernel{};
  std::string automatic_kernel{};  ///< the library's choice, whichever is forced
  /// Whether a caller with a tuned dense product is told to use that instead of the library's choice.
  bool prefers_dense = false;
};

/// Bell-shaped values of `dtype` in the machine's memory, the same for the same seed: the sum of four
/// uniform numbers. Codes must be as varied as a trained weight's, since lookups of equal codes are
/// faster on a GPU.
Buffer random_array(Machine& machine, int64_t count, float scale, uint64_t seed,
                    qlora_native::DType dtype);

/// The arrays of an adapter's passes, of the weight's dtype.
struct Adapter {
  Buffer a;   ///< [r, K]
  Buffer b;   ///< [N, r]
  Buffer t;   ///< [M, r]
  Buffer dy;  ///< [M, N]; the output of the backward pass is dX, its activations are X
  Buffer da, db;
};

/// What a pass of an adapter is multiplied by.
inline constexpr float kLoraScaling = 2.0f;

/// The operations on one weight. A new work of a problem ends the one before.
class Problem {
 public:
  Problem(Machine& machine, Shape shape, qlora_native::DType dtype, WeightFormat format = {});

  Work quantize();
  Work dequantize();
  Work matmul(int64_t m);
  Work matmul_transposed(int64_t m);
  /// With an adapter of that rank. In problem_lora.cpp, as what follows.
  Work lora_forward(int64_t m, int64_t rank);
  Work lora_backward(int64_t m, int64_t rank);

  Shape shape() const { return shape_; }
  qlora_native::DType dtype() const { return dtype_; }
  WeightFormat format() const { return format_; }

  // For verification: the dense weight, the first quantized copy, and the last work's first arrays.
  const Buffer& dense() const { return dense_.front(); }
  const QuantizedWeight& quantized() const { return quantized_.front(); }
  const Buffer& activations() const { return activations_; }
  const Buffer& output() const { return outputs_.front(); }
  const Adapter& adapter() const { return adapter_; }

 private:
  void make_adapter(int64_t m, int64_t rank);
  qlora_native::MatrixView matrix(const Buffer& buffer, int64_t rows, int64_t cols) const;
  qlora_native::MutableMatrixView mutable_matrix(const Buffer& buffer, int64_t rows,
                                                 int64_t cols) const;
  int64_t elem_bytes() const { return qlora_native::size_bytes(dtype_); }
  int64_t copies(int64_t bytes_each) const;
  /// Makes at least `count` copies of the quantized weight.
  void grow_quantized(int64_t count);
  void make_outputs(int64_t count, int64_t elems);
  void make_activations(int64_t rows, int64_t cols);
  void make_workspaces(const std::vector<int64_t>& sizes);
  qlora_native::Workspace workspace(size_t index) const;
  /// The costs of a product with m rows of activations; no calls yet.
  Work product(int64_t m) const;

  Machine& machine_;
  Shape shape_;
  qlora_native::DType dtype_;
  WeightFormat format_;
  std::vector<Buffer> dense_;
  std::vector<QuantizedWeight> quantized_;
  std::vector<Buffer> outputs_;
  std::vector<Buffer> workspaces_;
  Buffer activations_;
  Adapter adapter_;
};

}  // namespace bench
