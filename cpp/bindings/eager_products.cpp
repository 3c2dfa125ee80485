#include "eager_products.h"

#include <cstdlib>
#include <memory>

#include "qlora_native/dequantize.h"
#include "qlora_native/lora.h"
#include "qlora_native/matmul.h"

namespace nb = nanobind;
namespace qn = qlora_native;

namespace {

alignas(256) char g_nowhere[256];

qn::MutableMatrixView output_matrix(const qn::MatrixView& input, int64_t cols) {
  return {g_nowhere, input.rows, cols, cols, input.dtype, input.device};
}

/// Scratch of a kernel on a CPU, kept by the thread for its next call; null beyond 1 MiB.
void* cpu_scratch(int64_t size_bytes) {
  constexpr int64_t kMaxBytes = 1 << 20;
  constexpr int64_t kAlignment = 256;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t capacity = 0;
  if (size_bytes > kMaxBytes) return nullptr;
  if (size_bytes > capacity) {
    const int64_t rounded = (size_bytes + kAlignment - 1) / kAlignment * kAlignment;
    memory.reset(std::aligned_alloc(kAlignment, static_cast<size_t>(rounded)));
    capacity = memory ? rounded : 0;
  }
  return memory.get();
}

}  // namespace

/// What an operation computes, besides its arguments.
struct EagerProducts::Output {
  Shape shape;
  qn::DType dtype;
  qn::Device device;
  int64_t workspace_bytes = 0;
};

void* eager_nowhere() { return g_nowhere; }

nb::object EagerProducts::linear(nb::handle x, nb::handle bias, const EagerWeight& weight) {
  dlpack::Tensor described;
  qn::MatmulArgs args;
  Output output;
  if (weight.shape.ndim != 2 || weight.view.rows == 0 ||
      !read_activation(torch_, x, weight, weight.view.cols, &described, &args.x) ||
      !read_bias(torch_, bias, weight, args.x.dtype, &args.bias) ||
      !output_shape(described, weight.view.rows, &output.shape)) {
    return nb::none();
  }
  args.weight = weight.view;
  args.y = output_matrix(args.x, weight.view.rows);
  share_threads(weight.view.device);
  const qn::MatmulPlan plan = qn::matmul_4bit_plan(args);
  if (plan.prefers_dense) {
    const nb::object dense = decode(weight, args.x.dtype);
    return dense.is_none() ? dense : torch_.linear(x, dense, bias);
  }
  output.dtype = args.x.dtype;
  output.device = weight.view.device;
  output.workspace_bytes = plan.workspace_bytes;
  return run_into_new(output, [&](void* data, qn::Workspace workspace, qn::Stream stream) {
    args.y.data = data;
    qn::matmul_4bit(args, workspace, stream);
  });
}

nb::object EagerProducts::linear_dx(nb::handle dy, const EagerWeight& weight) {
  return linear_dx(dy, weight, nb::none());
}

bool EagerProducts::add_linear_dx(nb::handle dy, const EagerWeight& weight, nb::handle dx) {
  const nb::object result = linear_dx(dy, weight, dx);
  if (result.is_none()) return false;
  if (!result.is(dx)) torch_.add(dx, result);
  return true;
}

/// A dense product is added to `onto`, which then is the result; any other is a new tensor.
nb::object EagerProducts::linear_dx(nb::handle dy, const EagerWeight& weight, nb::handle onto) {
  dlpack::Tensor described;
  qn::MatmulTransposedArgs args;
  Output output;
  if (weight.shape.ndim != 2 || weight.view.cols == 0 ||
      !read_activation(torch_, dy, weight, weight.view.rows, &described, &args.dy) ||
      !output_shape(described, weight.view.cols, &output.shape)) {
    return nb::none();
  }
  args.weight = weight.view;
  args.dx = output_matrix(args.dy, weight.view.cols);
  share_threads(weight.view.device);
  const qn::MatmulPlan plan = qn::matmul_4bit_transposed_plan(args);
  if (plan.prefers_dense) {
    const nb::object dense = decode(weight, args.dy.dtype);
    if (dense.is_none()) return dense;
    return onto.is_none() ? torch_.matmul(dy, dense)
                          : torch_.addmm(onto, dy, dense, 1.0f, true, onto);
  }
  output.dtype = args.dy.dtype;
  output.device = weight.view.device;
  output.workspace_bytes = plan.workspace_bytes;
  return run_into_new(output, [&](void* data, qn::Workspace workspace, qn::Stream stream) {
    args.dx.data = data;
    qn::matmul_4bit_transposed(args, workspace, stream);
  });
}

nb::object EagerProducts::dequantize(const EagerWeight& weight, qn::DType dtype) {
  const Output output{weight.shape, dtype, weight.view.device};
  share_threads(output.device);
  return run_into_new(output, [&](void* data, qn::Workspace, qn::Stream stream) {
    qn::dequantize_4bit({weight.view, {data, weight.view.numel(), dtype, output.device}}, stream);
  });
}

nb::object EagerProducts::lora(nb::handle x, nb::handle bias, const AdapterObjects& adapter,
                               const EagerWeight& weight) {
  dlpack::Tensor described;
  qn::LoraForwardArgs args{};
  Output output;
  if (weight.shape.ndim != 2 || weight.view.rows == 0 ||
      !read_activation(torch_, x, weight, weight.view.cols, &described, &args.x) ||
      !read_bias(torch_, bias, weight, args.x.dtype, &args.bias) ||
      !read_adapter(torch_, adapter.a, adapter.b, weight, args.x.dtype, &args.a, &args.b) ||
      !output_shape(described, weight.view.rows, &output.shape)) {
    return nb::none();
  }
  args.weight = weight.view;
  args.scaling = adapter.scaling;
  args.y = output_matrix(args.x, weight.view.rows);
  share_threads(weight.view.device);
  const qn::MatmulArgs product{args.x, args.weight, args.bias, args.y};
  if (qn::matmul_4bit_plan(product).prefers_dense) return nb::none();
  output.dtype = args.x.dtype;
  output.device = weight.view.device;
  output.workspace_bytes = qn::lora_forward_workspace_bytes(args);
  return run_into_new(output, [&](void* data, qn::Workspace workspace, qn::Stream stream) {
    args.y.data = data;
    qn::lora_forward(args, workspace, stream);
  });
}

bool EagerProducts::can_decode(const EagerWeight& weight, qn::DType dtype) {
  constexpr int64_t kCpuBytes = 64 << 10;
  const qn::QuantizedView& view = weight.view;
  return !view.device.is_cpu() || view.numel() * qn::size_bytes(dtype) <= kCpuBytes;
}

nb::object EagerProducts::decode(const EagerWeight& weight, qn::DType dtype) {
  return can_decode(weight, dtype) ? dequantize(weight, dtype) : nb::none();
}

bool EagerProducts::allocate(qn::Device device, qn::Workspace* workspace, nb::object* owner) {
  if (workspace->size_bytes == 0) return true;
  if (device.is_cpu()) {
    workspace->data = cpu_scratch(workspace->size_bytes);
  } else {
    *owner = torch_.empty_bytes(workspace->size_bytes, device);
    workspace->data = torch_.address(*owner);
  }
  return workspace->data != nullptr;
}

template <class Kernel>
nb::object EagerProducts::run_into_new(const Output& output, const Kernel& kernel) {
  nb::object result = torch_.empty(output.shape.span(), output.dtype, output.device);
  void* const data = torch_.address(result);
  const auto into_result = [&](qn::Workspace workspace, qn::Stream stream) {
    kernel(data, workspace, stream);
  };
  if (data == nullptr || !run(output.device, output.workspace_bytes, into_result)) {
    return nb::none();
  }
  ++calls_;
  return result;
}
