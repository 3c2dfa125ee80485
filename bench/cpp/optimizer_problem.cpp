#include "optimizer_problem.h"

#include <algorithm>
#include <span>
#include <stdexcept>
#include <utility>

#include "models.h"
#include "problem.h"
#include "qlora_native/codebook.h"
#include "qlora_native/kernels.h"

namespace bench {
namespace {

namespace qn = qlora_native;

constexpr int64_t kRank = 16;
constexpr int kLoraLayers = 8;
constexpr double kLionBeta2 = 0.99;

TensorSizes lora_sizes() {
  TensorSizes sizes;
  for (int layer = 0; layer < kLoraLayers; ++layer) {
    for (const Linear& linear : projections_of(model_named("llama3-8b"))) {
      sizes.push_back(kRank * linear.shape.k);
      sizes.push_back(linear.shape.n * kRank);
    }
  }
  return sizes;
}

Buffer filled(Machine& machine, int64_t size_bytes, uint8_t value) {
  const std::vector<uint8_t> host(static_cast<size_t>(size_bytes), value);
  Buffer buffer(machine, size_bytes);
  machine.copy_to_device(buffer.as(), host.data(), size_bytes);
  return buffer;
}

}  // namespace

TensorSizes tensor_sizes_of(const std::string& name) {
  if (name == "lora") return lora_sizes();
  if (name == "full") return TensorSizes(16, 1 << 20);
  if (name == "large") return TensorSizes(300, 1'666'667);
  if (name == "tiny") return {64 * 80, 4097};
  throw std::invalid_argument("there are no tensors '" + name + "'");
}

OptimizerKind optimizer_kind_of(const std::string& name) {
  const bool is_lion = name.starts_with("lion");
  return {is_lion ? qn::OptimizerAlgorithm::kLion : qn::OptimizerAlgorithm::kAdamW,
          name.ends_with("8bit") ? qn::StateFormat::kDynamic8bit : qn::StateFormat::kFloat32};
}

double bytes_per_element(OptimizerKind kind, qn::DType dtype) {
  const double moment = kind.is_8bit() ? 1 + 4.0 / qn::kStateBlockSize : 4;
  return 3 * static_cast<double>(qn::size_bytes(dtype)) + 2 * kind.moments() * moment;
}

OptimizerProblem::OptimizerProblem(Machine& machine, const TensorSizes& sizes, qn::DType dtype,
                                   OptimizerKind kind)
    : machine_(machine), dtype_(dtype), kind_(kind) {
  if (kind.algorithm == qn::OptimizerAlgorithm::kLion) group_.beta2 = kLionBeta2;
  for (size_t i = 0; i < sizes.size(); ++i) add_tensor(sizes[i], i);
}

void OptimizerProblem::add_tensor(int64_t numel, uint64_t seed) {
  qn::OptimizerTensor tensor{.numel = numel,
                             .param_dtype = dtype_,
                             .grad_dtype = dtype_,
                             .state_format = kind_.state_format};
  tensor.param = keep(random_array(machine_, numel, 0.5f, 2 * seed + 1, dtype_));
  tensor.grad = keep(random_array(machine_, numel, 0.01f, 2 * seed + 2, dtype_));
  tensor.step = static_cast<float*>(keep(filled(machine_, sizeof(float), 0)));
  const int64_t blocks = qn::num_blocks(numel, qn::kStateBlockSize);
  for (int moment = 0; moment < kind_.moments(); ++moment) {
    const uint8_t zero = kind_.is_8bit() && moment == 0 ? qn::kSignedDynamicZeroCode : 0;
    void* const state = keep(filled(machine_, kind_.is_8bit() ? numel : 4 * numel, zero));
    void* const absmax = kind_.is_8bit() ? keep(filled(machine_, 4 * blocks, 0)) : nullptr;
    (moment == 0 ? tensor.state1 : tensor.state2) = state;
    (moment == 0 ? tensor.absmax1 : tensor.absmax2) = static_cast<float*>(absmax);
  }
  tensors_.push_back(tensor);
}

void* OptimizerProblem::keep(Buffer buffer) {
  buffers_.push_back(std::move(buffer));
  return buffers_.back().as();
}

qn::OptimizerStepArgs OptimizerProblem::args() const {
  return {.algorithm = kind_.algorithm,
          .tensors = tensors_,
          .groups = std::span(&group_, 1),
          .device = machine_.device()};
}

void OptimizerProblem::step() {
  if (workspace_.as() == nullptr) {
    workspace_ = Buffer(machine_, std::max<int64_t>(qn::optimizer_step_workspace_bytes(args()), 1));
  }
  qn::optimizer_step(args(), {workspace_.as(), workspace_.size_bytes()}, machine_.stream());
}

std::string OptimizerProblem::kernel() const { return qn::selected_kernel(args()); }

}  // namespace bench
