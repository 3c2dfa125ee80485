#include "problem.h"

#include <algorithm>
#include <utility>

#include "elements.h"

namespace bench {
namespace {

namespace qn = qlora_native;

constexpr int64_t kBlockSize = 64;

/// Bell-shaped values: the sum of four uniform numbers. Codes must be as varied as a trained
/// weight's, since lookups of equal codes are faster on a GPU.
std::vector<float> random_values(int64_t count, float scale, uint64_t seed) {
  std::vector<float> values(static_cast<size_t>(count));
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (float& value : values) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    float sum = 0;
    for (int shift = 0; shift < 64; shift += 16) sum += static_cast<float>(state >> shift & 0xFFFF);
    value = (sum / 65536.0f - 2.0f) * scale;
  }
  return values;
}

Buffer upload(Machine& machine, const std::vector<float>& values, qn::DType dtype) {
  const std::vector<uint8_t> raw = encode(values, dtype);
  Buffer buffer(machine, static_cast<int64_t>(raw.size()));
  machine.copy_to_device(buffer.as(), raw.data(), buffer.size_bytes());
  return buffer;
}

}  // namespace

QuantizedWeight::QuantizedWeight(Machine& machine, Shape shape)
    : packed(machine, qn::packed_bytes(shape.n * shape.k)),
      codes(machine, qn::num_blocks(shape.n * shape.k, kBlockSize)),
      absmax2(machine, 4 * qn::num_groups(qn::num_blocks(shape.n * shape.k, kBlockSize))),
      offset(machine, 4),
      shape_(shape),
      device_(machine.device()) {}

qn::MutableQuantizedView QuantizedWeight::mutable_view() const {
  return {.packed = packed.as<uint8_t>(),
          .absmax = {nullptr, codes.as<uint8_t>(), absmax2.as<float>(), offset.as<float>()},
          .rows = shape_.n,
          .cols = shape_.k,
          .block_size = kBlockSize,
          .codebook = qn::kNF4,
          .device = device_};
}

qn::QuantizedView QuantizedWeight::view() const {
  return {.packed = packed.as<uint8_t>(),
          .absmax = {nullptr, codes.as<uint8_t>(), absmax2.as<float>(), offset.as<float>()},
          .rows = shape_.n,
          .cols = shape_.k,
          .block_size = kBlockSize,
          .codebook = qn::kNF4,
          .device = device_};
}

int64_t QuantizedWeight::size_bytes() const {
  return packed.size_bytes() + codes.size_bytes() + absmax2.size_bytes() + offset.size_bytes();
}

Problem::Problem(Machine& machine, Shape shape, qn::DType dtype)
    : machine_(machine), shape_(shape), dtype_(dtype) {
  dense_.push_back(upload(machine, random_values(shape.n * shape.k, 0.02f, 1), dtype));
  // Fills every quantized copy there is; further ones are cloned from the first.
  for (const auto& call : quantize().calls) call();
}

int64_t Problem::copies(int64_t bytes_each) const { return machine_.cold_bytes() / bytes_each + 1; }

void Problem::grow_quantized(int64_t count) {
  while (static_cast<int64_t>(quantized_.size()) < count) {
    QuantizedWeight copy(machine_, shape_);
    if (!quantized_.empty()) {
      const auto clone = [&](const Buffer& from, const Buffer& to) {
        const std::vector<uint8_t> host = from.to_host<uint8_t>(from.size_bytes());
        machine_.copy_to_device(to.as(), host.data(), from.size_bytes());
      };
      clone(quantized().packed, copy.packed);
      clone(quantized().codes, copy.codes);
      clone(quantized().absmax2, copy.absmax2);
      clone(quantized().offset, copy.offset);
    }
    quantized_.push_back(std::move(copy));
  }
}

void Problem::make_outputs(int64_t count, int64_t elems) {
  outputs_.clear();
  for (int64_t i = 0; i < count; ++i) outputs_.emplace_back(machine_, elems * elem_bytes());
}

void Problem::make_activations(int64_t rows, int64_t cols) {
  activations_ = upload(machine_, random_values(rows * cols, 1.0f, 2), dtype_);
}

void Problem::make_workspaces(const std::vector<int64_t>& sizes) {
  workspaces_.clear();
  for (const int64_t size : sizes) workspaces_.emplace_back(machine_, std::max<int64_t>(size, 1));
}

qn::Workspace Problem::workspace(size_t index) const {
  return {workspaces_[index].as(), workspaces_[index].size_bytes()};
}

Work Problem::quantize() {
  const int64_t numel = shape_.n * shape_.k;
  const int64_t dense_bytes = numel * elem_bytes();
  const int64_t count = copies(dense_bytes);
  while (static_cast<int64_t>(dense_.size()) < count) {
    Buffer copy(machine_, dense_bytes);
    const std::vector<uint8_t> host = dense().to_host<uint8_t>(dense_bytes);
    machine_.copy_to_device(copy.as(), host.data(), dense_bytes);
    dense_.push_back(std::move(copy));
  }
  grow_quantized(count);
  std::vector<qn::QuantizeArgs> all;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    all.push_back({.input = {dense_[i].as(), numel, dtype_, machine_.device()},
                   .output = quantized_[i].mutable_view()});
    sizes.push_back(qn::quantize_4bit_workspace_bytes(all.back()));
  }
  make_workspaces(sizes);
  const int64_t weight_bytes = quantized().size_bytes();
  Work work{.calls = {},
            .bytes_per_call = dense_bytes + weight_bytes,
            .weight_bytes_per_call = weight_bytes,
            .kernel = qn::selected_kernel(all.front())};
  for (size_t i = 0; i < all.size(); ++i) {
    work.calls.push_back([this, args = all[i], space = workspace(i)] {
      qn::quantize_4bit(args, space, machine_.stream());
    });
  }
  return work;
}

Work Problem::dequantize() {
  const int64_t numel = shape_.n * shape_.k;
  const int64_t weight_bytes = quantized().size_bytes();
  const int64_t count = copies(weight_bytes);
  grow_quantized(count);
  make_outputs(count, numel);
  Work work{.calls = {},
            .bytes_per_call = numel * elem_bytes() + weight_bytes,
            .weight_bytes_per_call = weight_bytes};
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    const qn::DequantizeArgs args{.weight = quantized_[i].view(),
                                  .output = {outputs_[i].as(), numel, dtype_, machine_.device()}};
    if (i == 0) work.kernel = qn::selected_kernel(args);
    work.calls.push_back([this, args] { qn::dequantize_4bit(args, machine_.stream()); });
  }
  return work;
}

Work Problem::product(int64_t m) const {
  const int64_t weight_bytes = quantized().size_bytes();
  return {.calls = {},
          .bytes_per_call = weight_bytes + m * (shape_.n + shape_.k) * elem_bytes(),
          .weight_bytes_per_call = weight_bytes,
          .flops_per_call = 2 * m * shape_.n * shape_.k};
}

Work Problem::matmul(int64_t m) {
  const int64_t count = copies(quantized().size_bytes());
  grow_quantized(count);
  make_activations(m, shape_.k);
  make_outputs(count, m * shape_.n);
  std::vector<qn::MatmulArgs> all;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    all.push_back({.x = {activations_.as(), m, shape_.k, shape_.k, dtype_, machine_.device()},
                   .weight = quantized_[i].view(),
                   .bias = {},
                   .y = {outputs_[i].as(), m, shape_.n, shape_.n, dtype_, machine_.device()}});
    sizes.push_back(qn::matmul_4bit_workspace_bytes(all.back()));
  }
  make_workspaces(sizes);
  Work work = product(m);
  work.kernel = qn::selected_kernel(all.front());
  work.prefers_dense = qn::matmul_4bit_plan(all.front()).prefers_dense;
  for (size_t i = 0; i < all.size(); ++i) {
    work.calls.push_back([this, args = all[i], space = workspace(i)] {
      qn::matmul_4bit(args, space, machine_.stream());
    });
  }
  return work;
}

Work Problem::matmul_transposed(int64_t m) {
  const int64_t count = copies(quantized().size_bytes());
  grow_quantized(count);
  make_activations(m, shape_.n);
  make_outputs(count, m * shape_.k);
  std::vector<qn::MatmulTransposedArgs> all;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    all.push_back({.dy = {activations_.as(), m, shape_.n, shape_.n, dtype_, machine_.device()},
                   .weight = quantized_[i].view(),
                   .dx = {outputs_[i].as(), m, shape_.k, shape_.k, dtype_, machine_.device()}});
    sizes.push_back(qn::matmul_4bit_transposed_workspace_bytes(all.back()));
  }
  make_workspaces(sizes);
  Work work = product(m);
  work.kernel = qn::selected_kernel(all.front());
  work.prefers_dense = qn::matmul_4bit_transposed_plan(all.front()).prefers_dense;
  for (size_t i = 0; i < all.size(); ++i) {
    work.calls.push_back([this, args = all[i], space = workspace(i)] {
      qn::matmul_4bit_transposed(args, space, machine_.stream());
    });
  }
  return work;
}

}  // namespace bench
