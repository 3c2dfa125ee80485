// The operations as eager calls on torch's tensors: everything between the caller and the kernel in
// one function, for calls that nothing of torch has to see. A call of another kind returns None, and
// the caller goes through the torch operator, which sees to it or words the error.
#include <nanobind/nanobind.h>

#include <cstdlib>
#include <initializer_list>
#include <memory>

#include "bindings.h"
#include "eager_arguments.h"
#include "qlora_native/dequantize.h"
#include "qlora_native/lora.h"
#include "qlora_native/matmul.h"
#include "torch_eager.h"

namespace nb = nanobind;
namespace qn = qlora_native;
using namespace nb::literals;

namespace {

/// Stands for memory not yet allocated in questions about a call.
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

/// What an operation computes, besides its arguments.
struct Output {
  Shape shape;
  qn::DType dtype;
  qn::Device device;
  int64_t workspace_bytes = 0;
};

/// An adapter as Python has it.
struct AdapterObjects {
  nb::handle a, b;
  float scaling;
};

class EagerOps {
 public:
  explicit EagerOps(const TorchFunctions& functions) : torch_(functions) {}

  bool has_exchange_api() const { return torch_.has_exchange_api(); }
  bool is_observed() const { return torch_.is_observed(); }
  int64_t calls() const { return calls_; }

  bool is_plain(const nb::args& tensors) const {
    if (!torch_.has_exchange_api() || torch_.is_observed()) return false;
    for (const nb::handle tensor : tensors) {
      dlpack::Tensor described;
      if (tensor.is_none()) continue;
      if (!torch_.describe(tensor, &described) || torch_.is_negated(tensor)) return false;
    }
    return true;
  }

  nb::object linear(nb::handle x, nb::handle bias, const WeightObjects& objects,
                    bool heeds_autocast) {
    EagerWeight weight;
    if (!is_direct({x, bias}, heeds_autocast) || !read_weight(torch_, objects, &weight)) {
      return nb::none();
    }
    return run_linear(x, bias, weight);
  }

  nb::object linear_of_layer(nb::handle x, const LayerObjects& objects) {
    EagerWeight weight;
    nb::object bias;
    if (!read_layer(torch_, objects, &weight, &bias) || !is_direct({x, bias}, true)) {
      return nb::none();
    }
    return run_linear(x, bias, weight);
  }

  nb::object lora(nb::handle x, nb::handle bias, const AdapterObjects& adapter,
                  const WeightObjects& objects) {
    EagerWeight weight;
    if (!is_direct({x, bias, adapter.a, adapter.b}, true) ||
        !read_weight(torch_, objects, &weight)) {
      return nb::none();
    }
    return run_lora(x, bias, adapter, weight);
  }

  nb::object lora_of_layer(nb::handle x, const AdapterObjects& adapter,
                           const LayerObjects& objects) {
    EagerWeight weight;
    nb::object bias;
    if (!read_layer(torch_, objects, &weight, &bias) ||
        !is_direct({x, bias, adapter.a, adapter.b}, true)) {
      return nb::none();
    }
    return run_lora(x, bias, adapter, weight);
  }

  nb::object linear_dx(nb::handle dy, const WeightObjects& objects) {
    EagerWeight weight;
    dlpack::Tensor described;
    qn::MatmulTransposedArgs args;
    Output output;
    if (!is_direct({dy}, false) || !read_weight(torch_, objects, &weight) ||
        weight.shape.ndim != 2 || weight.view.cols == 0 ||
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
      return dense.is_none() ? dense : torch_.matmul(dy, dense);
    }
    output.dtype = args.dy.dtype;
    output.device = weight.view.device;
    output.workspace_bytes = plan.workspace_bytes;
    return run(output, [&](void* data, qn::Workspace workspace, qn::Stream stream) {
      args.dx.data = data;
      qn::matmul_4bit_transposed(args, workspace, stream);
    });
  }

  nb::object dequantize(const WeightObjects& objects, nb::handle dtype_object) {
    EagerWeight weight;
    qn::DType dtype;
    if (!is_direct({}, false) || !torch_.float_dtype(dtype_object, &dtype) ||
        !read_weight(torch_, objects, &weight) || weight.view.numel() == 0) {
      return nb::none();
    }
    return run_dequantize(weight, dtype);
  }

 private:
  /// Whether nothing of torch has to see an operation on these tensors.
  bool is_direct(std::initializer_list<nb::handle> tensors, bool heeds_autocast) const {
    if (!torch_.has_exchange_api()) return false;
    for (const nb::handle tensor : tensors) {
      if (!tensor.is_none() && !torch_.is_exact_tensor(tensor)) return false;
    }
    return !torch_.is_observed() && !(heeds_autocast && torch_.is_autocast_enabled()) &&
           !torch_.needs_grad(tensors);
  }

  nb::object run_linear(nb::handle x, nb::handle bias, const EagerWeight& weight) {
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
    return run(output, [&](void* data, qn::Workspace workspace, qn::Stream stream) {
      args.y.data = data;
      qn::matmul_4bit(args, workspace, stream);
    });
  }

  /// Without dropout. None where a dense product is faster: there are many rows then.
  nb::object run_lora(nb::handle x, nb::handle bias, const AdapterObjects& adapter,
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
    return run(output, [&](void* data, qn::Workspace workspace, qn::Stream stream) {
      args.y.data = data;
      qn::lora_forward(args, workspace, stream);
    });
  }

  /// The matrix for a dense product by torch. None under autocast, which would cast its factors,
  /// and on a CPU unless it is small: fresh memory costs more in page faults than the decoding, and
  /// the operator has scratch memory and panels.
  nb::object decode(const EagerWeight& weight, qn::DType dtype) {
    if (torch_.is_autocast_enabled()) return nb::none();
    constexpr int64_t kCpuBytes = 64 << 10;
    const int64_t size_bytes = weight.view.numel() * qn::size_bytes(dtype);
    if (weight.view.device.is_cpu() && size_bytes > kCpuBytes) return nb::none();
    return run_dequantize(weight, dtype);
  }

  nb::object run_dequantize(const EagerWeight& weight, qn::DType dtype) {
    const Output output{weight.shape, dtype, weight.view.device};
    share_threads(output.device);
    return run(output, [&](void* data, qn::Workspace, qn::Stream stream) {
      qn::dequantize_4bit({weight.view, {data, weight.view.numel(), dtype, output.device}}, stream);
    });
  }

  /// To be called before a kernel is planned: the workspace depends on the number of threads.
  void share_threads(qn::Device device) const {
    if (device.is_cpu()) torch_.share_num_threads();
  }

  /// Runs a kernel into a new tensor and returns that.
  template <class Kernel>
  nb::object run(const Output& output, const Kernel& kernel) {
    qn::Stream stream = qn::Stream::none();
    if (!torch_.current_stream(output.device, &stream)) return nb::none();
    // On a GPU it is freed before the kernel has run: until then, the allocator gives it to work on
    // this stream alone.
    nb::object workspace_owner;
    qn::Workspace workspace{nullptr, output.workspace_bytes};
    if (output.workspace_bytes > 0) {
      if (output.device.is_cpu()) {
        workspace.data = cpu_scratch(output.workspace_bytes);
      } else {
        workspace_owner = torch_.empty_bytes(output.workspace_bytes, output.device);
        workspace.data = address(workspace_owner);
      }
      if (workspace.data == nullptr) return nb::none();
    }
    nb::object result = torch_.empty(output.shape.span(), output.dtype, output.device);
    void* const data = address(result);
    if (data == nullptr) return nb::none();
    {
      // A launch waits too: for room in the queue, or for the first load of the kernel.
      const nb::gil_scoped_release no_gil;
      kernel(data, workspace, stream);
    }
    ++calls_;
    return result;
  }

  void* address(const nb::object& tensor) const {
    dlpack::Tensor described;
    return torch_.describe(tensor, &described) ? described.data : nullptr;
  }

  Torch torch_;
  int64_t calls_ = 0;
};

}  // namespace

void bind_eager(nb::module_& m) {
  using Object = nb::handle;
  nb::class_<EagerOps>(m, "EagerOps",
                       "Operations around torch's dispatcher. None: the call has to go through it.")
      .def(
          "__init__",
          [](EagerOps* self, nb::object exchange_api, nb::sequence tensor_types,
             nb::sequence observers, nb::object forward_ad, nb::object is_autocast_enabled,
             nb::object is_grad_enabled, nb::object is_neg, nb::object num_threads,
             nb::object empty_strided, nb::object device, nb::sequence float_dtypes,
             nb::object uint8, nb::object codebook, nb::object linear, nb::object matmul) {
            new (self)
                EagerOps({exchange_api, tensor_types, observers, forward_ad, is_autocast_enabled,
                          is_grad_enabled, is_neg, num_threads, empty_strided, device, float_dtypes,
                          uint8, codebook, linear, matmul});
          },
          nb::kw_only(), "exchange_api"_a.none(), "tensor_types"_a, "observers"_a, "forward_ad"_a,
          "is_autocast_enabled"_a, "is_grad_enabled"_a, "is_neg"_a, "num_threads"_a,
          "empty_strided"_a, "device"_a, "float_dtypes"_a, "uint8"_a, "codebook"_a, "linear"_a,
          "matmul"_a)
      .def_prop_ro("has_exchange_api", &EagerOps::has_exchange_api,
                   "Whether operations can run here at all.")
      .def_prop_ro("calls", &EagerOps::calls, "How many operations ran here.")
      .def("is_observed", &EagerOps::is_observed,
           "Whether a mode, a transform, a tracer or a profiler wants to see operators.")
      .def("is_plain", &EagerOps::is_plain, "tensors"_a,
           "Not is_observed(), and each tensor is what its memory on a CPU or a GPU holds.")
      .def(
          "linear_4bit",
          [](EagerOps& self, Object x, Object bias, Object packed, Object absmax, Object absmax2,
             Object offset, Object shape, Object block_size, Object quant_type, Object codebook,
             bool heeds_autocast) {
            return self.linear(
                x, bias, {packed, absmax, absmax2, offset, shape, block_size, quant_type, codebook},
                heeds_autocast);
          },
          "x"_a.none(), "bias"_a.none(), "packed"_a.none(), "absmax"_a.none(), "absmax2"_a.none(),
          "offset"_a.none(), "shape"_a.none(), "block_size"_a.none(), "quant_type"_a.none(),
          "codebook"_a.none(), "heeds_autocast"_a)
      .def(
          "linear_4bit_of_layer",
          [](EagerOps& self, Object x, nb::dict parameters, int64_t rows, int64_t cols,
             int64_t block_size, Object quant_type, Object codebook) {
            return self.linear_of_layer(x,
                                        {parameters, quant_type, codebook, rows, cols, block_size});
          },
          "x"_a.none(), "parameters"_a, "rows"_a, "cols"_a, "block_size"_a, "quant_type"_a.none(),
          "codebook"_a.none(), "Over the parameters of nn.Linear4bit. Heeds autocast.")
      .def(
          "linear_4bit_lora",
          [](EagerOps& self, Object x, Object bias, Object a, Object b, float scaling,
             Object packed, Object absmax, Object absmax2, Object offset, Object shape,
             Object block_size, Object quant_type, Object codebook) {
            return self.lora(
                x, bias, {a, b, scaling},
                {packed, absmax, absmax2, offset, shape, block_size, quant_type, codebook});
          },
          "x"_a.none(), "bias"_a.none(), "a"_a.none(), "b"_a.none(), "scaling"_a, "packed"_a.none(),
          "absmax"_a.none(), "absmax2"_a.none(), "offset"_a.none(), "shape"_a.none(),
          "block_size"_a.none(), "quant_type"_a.none(), "codebook"_a.none(),
          "Without dropout. Heeds autocast.")
      .def(
          "linear_4bit_lora_of_layer",
          [](EagerOps& self, Object x, Object a, Object b, float scaling, nb::dict parameters,
             int64_t rows, int64_t cols, int64_t block_size, Object quant_type, Object codebook) {
            return self.lora_of_layer(x, {a, b, scaling},
                                      {parameters, quant_type, codebook, rows, cols, block_size});
          },
          "x"_a.none(), "a"_a.none(), "b"_a.none(), "scaling"_a, "parameters"_a, "rows"_a, "cols"_a,
          "block_size"_a, "quant_type"_a.none(), "codebook"_a.none(),
          "Over the parameters of nn.Linear4bit, without dropout. Heeds autocast.")
      .def(
          "linear_4bit_dx",
          [](EagerOps& self, Object dy, Object packed, Object absmax, Object absmax2, Object offset,
             Object shape, Object block_size, Object quant_type, Object codebook) {
            return self.linear_dx(
                dy, {packed, absmax, absmax2, offset, shape, block_size, quant_type, codebook});
          },
          "dy"_a.none(), "packed"_a.none(), "absmax"_a.none(), "absmax2"_a.none(),
          "offset"_a.none(), "shape"_a.none(), "block_size"_a.none(), "quant_type"_a.none(),
          "codebook"_a.none())
      .def(
          "dequantize_4bit",
          [](EagerOps& self, Object packed, Object absmax, Object absmax2, Object offset,
             Object shape, Object block_size, Object quant_type, Object codebook, Object dtype) {
            return self.dequantize(
                {packed, absmax, absmax2, offset, shape, block_size, quant_type, codebook}, dtype);
          },
          "packed"_a.none(), "absmax"_a.none(), "absmax2"_a.none(), "offset"_a.none(),
          "shape"_a.none(), "block_size"_a.none(), "quant_type"_a.none(), "codebook"_a.none(),
          "dtype"_a.none());
}
