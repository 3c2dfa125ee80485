// The passes of a 4-bit weight and its adapter.
#include "problem.h"
#include "qlora_native/lora.h"

namespace bench {

namespace qn = qlora_native;

qn::MatrixView Problem::matrix(const Buffer& buffer, int64_t rows, int64_t cols) const {
  return {buffer.as(), rows, cols, cols, dtype_, machine_.device()};
}

qn::MutableMatrixView Problem::mutable_matrix(const Buffer& buffer, int64_t rows,
                                              int64_t cols) const {
  return {buffer.as(), rows, cols, cols, dtype_, machine_.device()};
}

void Problem::make_adapter(int64_t m, int64_t rank) {
  const auto [n, k] = shape_;
  const auto random = [&](int64_t count, float scale, uint64_t seed) {
    return random_array(machine_, count, scale, seed, dtype_);
  };
  adapter_.a = random(rank * k, 0.02f, 3);
  adapter_.b = random(n * rank, 0.02f, 4);
  adapter_.t = random(m * rank, 1.0f, 5);
  adapter_.dy = random(m * n, 1.0f, 6);
  adapter_.da = Buffer(machine_, rank * k * elem_bytes());
  adapter_.db = Buffer(machine_, n * rank * elem_bytes());
}

Work Problem::lora_forward(int64_t m, int64_t rank) {
  const auto [n, k] = shape_;
  const int64_t count = copies(quantized().size_bytes());
  grow_quantized(count);
  make_activations(m, k);
  make_adapter(m, rank);
  make_outputs(count, m * n);
  std::vector<qn::LoraForwardArgs> all;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    all.push_back({.x = matrix(activations_, m, k),
                   .weight = quantized_[i].view(),
                   .bias = {},
                   .a = matrix(adapter_.a, rank, k),
                   .b = matrix(adapter_.b, n, rank),
                   .scaling = kLoraScaling,
                   .dropout = {},
                   .t = mutable_matrix(adapter_.t, m, rank),
                   .y = mutable_matrix(outputs_[i], m, n)});
    sizes.push_back(qn::lora_forward_workspace_bytes(all.back()));
  }
  make_workspaces(sizes);
  Work work = product(m);
  work.bytes_per_call += (rank * (n + k) + m * rank) * elem_bytes();
  work.flops_per_call += 2 * m * rank * (n + k);
  for (size_t i = 0; i < all.size(); ++i) {
    work.calls.push_back([this, args = all[i], space = workspace(i)] {
      qn::lora_forward(args, space, machine_.stream());
    });
  }
  return work;
}

Work Problem::lora_backward(int64_t m, int64_t rank) {
  const auto [n, k] = shape_;
  const int64_t count = copies(quantized().size_bytes());
  grow_quantized(count);
  make_activations(m, k);
  make_adapter(m, rank);
  make_outputs(count, m * k);
  std::vector<qn::LoraBackwardArgs> all;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    all.push_back({.dy = matrix(adapter_.dy, m, n),
                   .x = matrix(activations_, m, k),
                   .t = matrix(adapter_.t, m, rank),
                   .weight = quantized_[i].view(),
                   .a = matrix(adapter_.a, rank, k),
                   .b = matrix(adapter_.b, n, rank),
                   .scaling = kLoraScaling,
                   .dropout = {},
                   .dx = mutable_matrix(outputs_[i], m, k),
                   .da = mutable_matrix(adapter_.da, rank, k),
                   .db = mutable_matrix(adapter_.db, n, rank)});
    sizes.push_back(qn::lora_backward_workspace_bytes(all.back()));
  }
  make_workspaces(sizes);
  Work work = product(m);
  // X besides dX, the factors and their gradients, t.
  work.bytes_per_call += (m * k + 2 * rank * (n + k) + m * rank) * elem_bytes();
  work.flops_per_call += 4 * m * rank * (n + k);
  for (size_t i = 0; i < all.size(); ++i) {
    work.calls.push_back([this, args = all[i], space = workspace(i)] {
      qn::lora_backward(args, space, machine_.stream());
    });
  }
  return work;
}

}  // namespace bench
