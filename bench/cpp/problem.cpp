#include "problem.h"

#include <algorithm>
#include <bit>

namespace qn_bench {
namespace {

namespace qn = qlora_native;

constexpr int64_t kBlockSize = 64;
constexpr qn::DType kDType = qn::DType::kBFloat16;
constexpr int64_t kElemBytes = qn::size_bytes(kDType);

/// Bell-shaped values as bf16: the sum of four uniform numbers. Codes must be as varied as a
/// trained weight's, since lookups of equal codes are faster on a GPU.
std::vector<uint16_t> random_values(int64_t count, float scale, uint64_t seed) {
  std::vector<uint16_t> values(static_cast<size_t>(count));
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (uint16_t& value : values) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    float sum = 0;
    for (int shift = 0; shift < 64; shift += 16) sum += static_cast<float>(state >> shift & 0xFFFF);
    const float x = (sum / 65536.0f - 2.0f) * scale;
    value = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);
  }
  return values;
}

Buffer upload(Machine& machine, const std::vector<uint16_t>& values) {
  const auto size_bytes = static_cast<int64_t>(values.size()) * kElemBytes;
  Buffer buffer(machine, size_bytes);
  machine.copy_to_device(buffer.as(), values.data(), size_bytes);
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

Problem::Problem(Machine& machine, Shape shape) : machine_(machine), shape_(shape) {
  dense_.push_back(upload(machine, random_values(shape.n * shape.k, 0.02f, 1)));
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
  for (int64_t i = 0; i < count; ++i) outputs_.emplace_back(machine_, elems * kElemBytes);
}

void Problem::make_activations(int64_t rows, int64_t cols) {
  activations_ = upload(machine_, random_values(rows * cols, 1.0f, 2));
}

void Problem::make_workspaces(const std::vector<int64_t>& sizes) {
  workspaces_.clear();
  for (const int64_t size : sizes) workspaces_.emplace_back(machine_, std::max<int64_t>(size, 1));
}

qn::Workspace Problem::workspace(size_t index) const {
  return {workspaces_[index].as(), workspaces_[index].size_bytes()};
}

qn::VectorView Problem::vector(const Buffer& buffer, int64_t size) const {
  return {buffer.as(), size, kDType, machine_.device()};
}

Problem::Work Problem::quantize() {
  const int64_t numel = shape_.n * shape_.k;
  const int64_t count = copies(numel * kElemBytes);
  while (static_cast<int64_t>(dense_.size()) < count) {
    Buffer copy(machine_, numel * kElemBytes);
    const std::vector<uint16_t> host = dense().to_host<uint16_t>(numel);
    machine_.copy_to_device(copy.as(), host.data(), numel * kElemBytes);
    dense_.push_back(std::move(copy));
  }
  grow_quantized(count);
  std::vector<qn::QuantizeArgs> all;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    all.push_back({.input = vector(dense_[i], numel), .output = quantized_[i].mutable_view()});
    sizes.push_back(qn::quantize_4bit_workspace_bytes(all.back()));
  }
  make_workspaces(sizes);
  Work work{.calls = {},
            .bytes_per_call = numel * kElemBytes + quantized().size_bytes(),
            .flops_per_call = 0};
  for (size_t i = 0; i < all.size(); ++i) {
    work.calls.push_back([this, args = all[i], space = workspace(i)] {
      qn::quantize_4bit(args, space, machine_.stream());
    });
  }
  return work;
}

Problem::Work Problem::dequantize() {
  const int64_t numel = shape_.n * shape_.k;
  const int64_t count = copies(quantized().size_bytes());
  grow_quantized(count);
  make_outputs(count, numel);
  Work work{.calls = {},
            .bytes_per_call = numel * kElemBytes + quantized().size_bytes(),
            .flops_per_call = 0};
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    const qn::DequantizeArgs args{.weight = quantized_[i].view(),
                                  .output = {outputs_[i].as(), numel, kDType, machine_.device()}};
    work.calls.push_back([this, args] { qn::dequantize_4bit(args, machine_.stream()); });
  }
  return work;
}

Problem::Work Problem::matmul(int64_t m) {
  const int64_t count = copies(quantized().size_bytes());
  grow_quantized(count);
  make_activations(m, shape_.k);
  make_outputs(count, m * shape_.n);
  std::vector<qn::MatmulArgs> all;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    all.push_back({.x = {activations_.as(), m, shape_.k, shape_.k, kDType, machine_.device()},
                   .weight = quantized_[i].view(),
                   .bias = {},
                   .y = {outputs_[i].as(), m, shape_.n, shape_.n, kDType, machine_.device()}});
    sizes.push_back(qn::matmul_4bit_workspace_bytes(all.back()));
  }
  make_workspaces(sizes);
  Work work{.calls = {},
            .bytes_per_call = quantized().size_bytes() + m * (shape_.n + shape_.k) * kElemBytes,
            .flops_per_call = 2 * m * shape_.n * shape_.k};
  for (size_t i = 0; i < all.size(); ++i) {
    work.calls.push_back([this, args = all[i], space = workspace(i)] {
      qn::matmul_4bit(args, space, machine_.stream());
    });
  }
  return work;
}

Problem::Work Problem::matmul_transposed(int64_t m) {
  const int64_t count = copies(quantized().size_bytes());
  grow_quantized(count);
  make_activations(m, shape_.n);
  make_outputs(count, m * shape_.k);
  std::vector<qn::MatmulTransposedArgs> all;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    all.push_back({.dy = {activations_.as(), m, shape_.n, shape_.n, kDType, machine_.device()},
                   .weight = quantized_[i].view(),
                   .dx = {outputs_[i].as(), m, shape_.k, shape_.k, kDType, machine_.device()}});
    sizes.push_back(qn::matmul_4bit_transposed_workspace_bytes(all.back()));
  }
  make_workspaces(sizes);
  Work work{.calls = {},
            .bytes_per_call = quantized().size_bytes() + m * (shape_.n + shape_.k) * kElemBytes,
            .flops_per_call = 2 * m * shape_.n * shape_.k};
  for (size_t i = 0; i < all.size(); ++i) {
    work.calls.push_back([this, args = all[i], space = workspace(i)] {
      qn::matmul_4bit_transposed(args, space, machine_.stream());
    });
  }
  return work;
}

}  // namespace qn_bench
