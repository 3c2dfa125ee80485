// The argument checks of the adapters' operations.
#include <cmath>
#include <cstdint>

#include "argument_checks.h"
#include "validate.h"
#include "validation_failure.h"

namespace qlora_native {
namespace {

/// One call: whose name begins the messages, and whose device and dtype the others must have.
struct Call {
  const char* op;
  const char* anchor_name;
  Device device;
  DType dtype;

  void check_shape(const char* what, const MatrixView& view, int64_t rows, int64_t cols) const {
    check_matrix(op, what, view, device, anchor_name);
    if (view.rows != rows || view.cols != cols) {
      fail(op, ": ", what, " is ", view.rows, " x ", view.cols, ", expected ", rows, " x ", cols);
    }
  }

  /// Of the dtype of the call.
  void check_activations(const char* what, const MatrixView& view, int64_t rows,
                         int64_t cols) const {
    check_shape(what, view, rows, cols);
    if (view.dtype != dtype) {
      fail(op, ": ", anchor_name, " is ", name(dtype), " but ", what, " is ", name(view.dtype));
    }
  }

  /// Of the dtype of the call, or fp32.
  void check_parameters(const char* what, const MatrixView& view, int64_t rows,
                        int64_t cols) const {
    check_shape(what, view, rows, cols);
    if (view.dtype != dtype && view.dtype != DType::kFloat32) {
      fail(op, ": ", anchor_name, " is ", name(dtype), " but ", what, " is ", name(view.dtype),
           ", expected the same or float32");
    }
  }

  void check_numbers(float scaling, const Dropout& dropout) const {
    if (!std::isfinite(scaling)) fail(op, ": scaling is ", scaling);
    if (!(dropout.p >= 0.0f && dropout.p <= 1.0f)) {
      fail(op, ": the dropout probability is ", dropout.p, ", expected 0 <= p <= 1");
    }
  }
};

/// A call whose other arguments follow `anchor`, once that is checked by itself.
Call call_like(const char* op, const char* anchor_name, const MatrixView& anchor) {
  check_matrix(op, anchor_name, anchor, anchor.device, anchor_name);
  return {op, anchor_name, anchor.device, anchor.dtype};
}

void check_weight(const Call& call, const QuantizedView& weight, int64_t rows, int64_t cols) {
  check_quantized(call.op, weight);
  check_device(call.op, kWeight, weight.device, call.device, call.anchor_name);
  if (weight.rows != rows || weight.cols != cols) {
    fail(call.op, ": the weight is ", weight.rows, " x ", weight.cols, ", expected ", rows, " x ",
         cols);
  }
}

}  // namespace

void validate(const LoraProjectArgs& args) {
  const Call call = call_like("lora_project", "x", args.x);
  const int64_t c = args.x.cols;
  const int64_t r = args.t.cols;
  call.check_numbers(args.scaling, args.dropout);
  call.check_activations("t", as_const(args.t), args.x.rows, r);
  call.check_parameters("the factor", args.factor, args.factor_transposed ? c : r,
                        args.factor_transposed ? r : c);
}

void validate(const LoraUpdateArgs& args) {
  const Call call = call_like("lora_update", "y", as_const(args.y));
  const int64_t c = args.y.cols;
  const int64_t r = args.t.cols;
  call.check_numbers(args.scaling, args.dropout);
  call.check_activations("t", args.t, args.y.rows, r);
  call.check_parameters("the factor", args.factor, args.factor_transposed ? r : c,
                        args.factor_transposed ? c : r);
}

void validate(const LoraGradientArgs& args) {
  const Call call = call_like("lora_gradient", "v", args.v);
  const int64_t c = args.v.cols;
  const int64_t r = args.s.cols;
  call.check_numbers(args.scaling, args.dropout);
  call.check_activations("s", args.s, args.v.rows, r);
  call.check_parameters("grad", as_const(args.grad), args.transposed ? c : r,
                        args.transposed ? r : c);
}

void validate(const LoraForwardArgs& args) {
  const Call call = call_like("lora_forward", "x", args.x);
  const QuantizedView& w = args.weight;
  const int64_t m = args.x.rows;
  const int64_t r = args.a.rows;
  call.check_numbers(args.scaling, args.dropout);
  check_weight(call, w, w.rows, args.x.cols);
  call.check_activations("y", as_const(args.y), m, w.rows);
  call.check_parameters("a", args.a, r, w.cols);
  call.check_parameters("b", args.b, w.rows, r);
  check_extent(call.op, "t", m, r);
  if (args.t.data != nullptr) call.check_activations("t", as_const(args.t), m, r);
  if (args.bias.data != nullptr) {
    check_vector(call.op, "the bias", args.bias, w.rows, call.device, call.anchor_name);
    if (args.bias.dtype != call.dtype) {
      fail(call.op, ": x is ", name(call.dtype), " but the bias is ", name(args.bias.dtype));
    }
  }
}

void validate(const LoraBackwardArgs& args) {
  const Call call = call_like("lora_backward", "dy", args.dy);
  const int64_t m = args.dy.rows;
  const int64_t n = args.dy.cols;
  call.check_numbers(args.scaling, args.dropout);
  if (args.dx.data != nullptr || args.da.data != nullptr) {
    call.check_parameters("b", args.b, n, args.b.cols);
    check_extent(call.op, "u", m, args.b.cols);
  }
  if (args.dx.data != nullptr) {
    const int64_t k = args.dx.cols;
    call.check_activations("dx", as_const(args.dx), m, k);
    check_weight(call, args.weight, n, k);
    call.check_parameters("a", args.a, args.b.cols, k);
  }
  if (args.da.data != nullptr) {
    call.check_activations("x", args.x, m, args.x.cols);
    call.check_parameters("da", as_const(args.da), args.b.cols, args.x.cols);
  }
  if (args.db.data != nullptr) {
    call.check_activations("t", args.t, m, args.t.cols);
    call.check_parameters("db", as_const(args.db), n, args.t.cols);
  }
}

}  // namespace qlora_native
