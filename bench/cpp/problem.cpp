#include "problem.h"

#include <algorithm>
#include <utility>

#include "elements.h"

namespace bench {
namespace {

namespace qn = qlora_native;

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

qn::Codebook codebook_of(qn::QuantType type) {
  return type == qn::QuantType::kFP4    ? qn::kFP4
         : type == qn::QuantType::kINT4 ? qn::kINT4
                                        : qn::kNF4;
}

/// What `ask` says while the library may choose the kernel.
template <class Ask>
auto without_forcing(qn::Op op, qn::DeviceType device, const Ask& ask) {
  const std::string forced = qn::forced_kernel(op, device);
  qn::force_kernel(op, device, "");
  const auto answer = ask();
  qn::force_kernel(op, device, forced);
  return answer;
}

template <class Args>
void ask_for_kernels(qn::Op op, qn::DeviceType device, const Args& args, Work& work) {
  work.kernel = qn::selected_kernel(args);
  work.automatic_kernel = without_forcing(op, device, [&] { return qn::selected_kernel(args); });
}

}  // namespace

Buffer random_array(Machine& machine, int64_t count, float scale, uint64_t seed, qn::DType dtype) {
  const std::vector<uint8_t> raw = encode(random_values(count, scale, seed), dtype);
  Buffer buffer(machine, static_cast<int64_t>(raw.size()));
  machine.copy_to_device(buffer.as(), raw.data(), buffer.size_bytes());
  return buffer;
}

QuantizedWeight::QuantizedWeight(Machine& machine, Shape shape, WeightFormat format)
    : packed(machine, qn::packed_bytes(shape.n * shape.k)),
      shape_(shape),
      format_(format),
      device_(machine.device()) {
  const int64_t blocks = qn::num_blocks(shape.n * shape.k, format.block_size);
  if (format.double_quant) {
    codes = Buffer(machine, blocks);
    absmax2 = Buffer(machine, 4 * qn::num_groups(blocks));
    offset = Buffer(machine, 4);
  } else {
    absmax = Buffer(machine, 4 * blocks);
  }
}

qn::MutableQuantizedView QuantizedWeight::mutable_view() const {
  return {
      .packed = packed.as<uint8_t>(),
      .absmax = {absmax.as<float>(), codes.as<uint8_t>(), absmax2.as<float>(), offset.as<float>()},
      .rows = shape_.n,
      .cols = shape_.k,
      .block_size = format_.block_size,
      .codebook = codebook_of(format_.quant_type),
      .device = device_};
}

qn::QuantizedView QuantizedWeight::view() const {
  const qn::MutableQuantizedView view = mutable_view();
  return {
      .packed = view.packed,
      .absmax = {view.absmax.values, view.absmax.codes, view.absmax.absmax2, view.absmax.offset},
      .rows = view.rows,
      .cols = view.cols,
      .block_size = view.block_size,
      .codebook = view.codebook,
      .device = view.device};
}

int64_t QuantizedWeight::size_bytes() const {
  int64_t bytes = 0;
  for (const Buffer* part : {&packed, &absmax, &codes, &absmax2, &offset}) {
    bytes += part->size_bytes();
  }
  return bytes;
}

Problem::Problem(Machine& machine, Shape shape, qn::DType dtype, WeightFormat format)
    : machine_(machine), shape_(shape), dtype_(dtype), format_(format) {
  dense_.push_back(random_array(machine, shape.n * shape.k, 0.02f, 1, dtype));
  // Fills every quantized copy there is; further ones are cloned from the first. Whatever kernel is
  // forced is for the work to come.
  without_forcing(qn::Op::kQuantize4bit, machine.device().type, [&] {
    for (const auto& call : quantize().calls) call();
    return true;
  });
}

int64_t Problem::copies(int64_t bytes_each) const { return machine_.cold_bytes() / bytes_each + 1; }

void Problem::grow_quantized(int64_t count) {
  while (static_cast<int64_t>(quantized_.size()) < count) {
    QuantizedWeight copy(machine_, shape_, format_);
    if (!quantized_.empty()) {
      const auto clone = [&](const Buffer& from, const Buffer& to) {
        const std::vector<uint8_t> host = from.to_host<uint8_t>(from.size_bytes());
        if (!host.empty()) machine_.copy_to_device(to.as(), host.data(), from.size_bytes());
      };
      clone(quantized().packed, copy.packed);
      clone(quantized().absmax, copy.absmax);
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
  activations_ = random_array(machine_, rows * cols, 1.0f, 2, dtype_);
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
            .weight_bytes_per_call = weight_bytes};
  ask_for_kernels(qn::Op::kQuantize4bit, machine_.device().type, all.front(), work);
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
    if (i == 0) ask_for_kernels(qn::Op::kDequantize4bit, machine_.device().type, args, work);
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
  ask_for_kernels(qn::Op::kMatmul4bit, machine_.device().type, all.front(), work);
  work.prefers_dense = without_forcing(qn::Op::kMatmul4bit, machine_.device().type, [&] {
    return qn::matmul_4bit_plan(all.front()).prefers_dense;
  });
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
  ask_for_kernels(qn::Op::kMatmul4bitTransposed, machine_.device().type, all.front(), work);
  work.prefers_dense = without_forcing(qn::Op::kMatmul4bitTransposed, machine_.device().type, [&] {
    return qn::matmul_4bit_transposed_plan(all.front()).prefers_dense;
  });
  for (size_t i = 0; i < all.size(); ++i) {
    work.calls.push_back([this, args = all[i], space = workspace(i)] {
      qn::matmul_4bit_transposed(args, space, machine_.stream());
    });
  }
  return work;
}

}  // namespace bench
