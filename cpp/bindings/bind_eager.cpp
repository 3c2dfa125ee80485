// The operations as eager calls on torch's tensors: everything between the caller and the kernel in
// one function, for calls that nothing of torch has to see. A call of another kind returns None, and
// the caller goes through the torch operator, which sees to it or words the error.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>

#include "bindings.h"
#include "eager_arguments.h"
#include "eager_lora.h"
#include "eager_products.h"
#include "torch_eager.h"

namespace nb = nanobind;
namespace qn = qlora_native;
using namespace nb::literals;

namespace {

class EagerOps {
 public:
  explicit EagerOps(const TorchFunctions& functions)
      : torch_(functions), products_(torch_), lora_(torch_, products_) {}
  EagerOps(const EagerOps&) = delete;
  EagerOps& operator=(const EagerOps&) = delete;

  bool has_exchange_api() const { return torch_.has_exchange_api(); }
  bool is_observed() const { return torch_.is_observed(); }
  int64_t calls() const { return products_.calls(); }

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
    return products_.linear(x, bias, weight);
  }

  nb::object linear_of_layer(nb::handle x, const LayerObjects& objects) {
    EagerWeight weight;
    nb::object bias;
    if (!read_layer(torch_, objects, &weight, &bias) || !is_direct({x, bias}, true)) {
      return nb::none();
    }
    return products_.linear(x, bias, weight);
  }

  nb::object lora(nb::handle x, nb::handle bias, const AdapterObjects& adapter,
                  const WeightObjects& objects) {
    EagerWeight weight;
    if (!is_direct({x, bias, adapter.a, adapter.b}, true) ||
        !read_weight(torch_, objects, &weight)) {
      return nb::none();
    }
    return products_.lora(x, bias, adapter, weight);
  }

  nb::object lora_of_layer(nb::handle x, const AdapterObjects& adapter,
                           const LayerObjects& objects) {
    EagerWeight weight;
    nb::object bias;
    if (!read_layer(torch_, objects, &weight, &bias) ||
        !is_direct({x, bias, adapter.a, adapter.b}, true)) {
      return nb::none();
    }
    return products_.lora(x, bias, adapter, weight);
  }

  nb::object linear_dx(nb::handle dy, const WeightObjects& objects) {
    EagerWeight weight;
    if (!is_direct({dy}, false) || !read_weight(torch_, objects, &weight)) return nb::none();
    return products_.linear_dx(dy, weight);
  }

  nb::object dequantize(const WeightObjects& objects, nb::handle dtype_object) {
    EagerWeight weight;
    qn::DType dtype;
    if (!is_direct({}, false) || !torch_.float_dtype(dtype_object, &dtype) ||
        !read_weight(torch_, objects, &weight) || weight.view.numel() == 0) {
      return nb::none();
    }
    return products_.dequantize(weight, dtype);
  }

  nb::object lora_forward(nb::handle x, const qn::Dropout& dropout, nb::handle layers) {
    return lora_.forward(x, dropout, layers);
  }
  nb::object lora_backward(nb::handle dy, nb::handle x, nb::handle t, const qn::Dropout& dropout,
                           nb::handle layers, nb::handle wanted) {
    return lora_.backward(dy, x, t, dropout, layers, wanted);
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

  Torch torch_;
  EagerProducts products_;
  EagerLora lora_;
};

}  // namespace

void bind_eager(nb::module_& m) {
  using Object = nb::handle;
  nb::class_<EagerOps>(m, "EagerOps",
                       "Operations around torch's dispatcher. None: the call has to go through it.")
      .def(
          "__init__",
          [](EagerOps* self, nb::object functions) {
            new (self) EagerOps(torch_functions(functions));
          },
          "functions"_a, "Over what torch lends: an object with the attributes of TorchFunctions.")
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
      .def("lora_forward", &EagerOps::lora_forward, "x"_a.none(), "dropout"_a, "layers"_a,
           "y of every layer, and t: see eager_lora.h.")
      .def("lora_backward", &EagerOps::lora_backward, "dy"_a, "x"_a.none(), "t"_a.none(),
           "dropout"_a, "layers"_a, "wanted"_a)
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
