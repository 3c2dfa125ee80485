// The parameters of a model on a machine, and an optimizer over them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "machine.h"
#include "qlora_native/optimizer.h"

namespace bench {

/// Elements of each parameter.
using TensorSizes = std::vector<int64_t>;

/// "lora", "full", "large", "tiny", as the help describes them.
TensorSizes tensor_sizes_of(const std::string& name);

struct OptimizerKind {
  qlora_native::OptimizerAlgorithm algorithm;
  qlora_native::StateFormat state_format;

  int moments() const { return algorithm == qlora_native::OptimizerAlgorithm::kAdamW ? 2 : 1; }
  bool is_8bit() const { return state_format == qlora_native::StateFormat::kDynamic8bit; }
};

/// "adamw", "adamw8bit", "lion", "lion8bit".
OptimizerKind optimizer_kind_of(const std::string& name);

/// What a step has to move for an element: parameter and moments read and written, gradient read.
double bytes_per_element(OptimizerKind kind, qlora_native::DType dtype);

class OptimizerProblem {
 public:
  /// Parameters and gradients of `dtype`, random; moments that are zero.
  OptimizerProblem(Machine& machine, const TensorSizes& sizes, qlora_native::DType dtype,
                   OptimizerKind kind);
  OptimizerProblem(const OptimizerProblem&) = delete;
  OptimizerProblem& operator=(const OptimizerProblem&) = delete;

  /// Queues a step. The first one takes the workspace that its kernel needs.
  void step();
  /// The kernel that a step runs.
  std::string kernel() const;

  Machine& machine() const { return machine_; }
  OptimizerKind kind() const { return kind_; }
  qlora_native::DType dtype() const { return dtype_; }
  const qlora_native::OptimizerGroup& group() const { return group_; }
  const std::vector<qlora_native::OptimizerTensor>& tensors() const { return tensors_; }

 private:
  void add_tensor(int64_t numel, uint64_t seed);
  void* keep(Buffer buffer);
  qlora_native::OptimizerStepArgs args() const;

  Machine& machine_;
  qlora_native::DType dtype_;
  OptimizerKind kind_;
  qlora_native::OptimizerGroup group_;
  std::vector<qlora_native::OptimizerTensor> tensors_;
  std::vector<Buffer> buffers_;
  Buffer workspace_;
};

}  // namespace bench
