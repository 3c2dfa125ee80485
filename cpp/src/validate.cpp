#include "validate.h"

#include <cmath>

#include "argument_checks.h"
#include "validation_failure.h"

namespace qlora_native {

void validate(const char* op, const Codebook& book) {
  const auto code = static_cast<int32_t>(book.type);
  if (code < 0 || code > static_cast<int32_t>(QuantType::kCustom)) {
    fail(op, ": unknown quant_type code ", code);
  }
  if (book.type != QuantType::kCustom) return;
  for (int i = 0; i < 16; ++i) {
    if (!std::isfinite(book.values[i])) fail(op, ": codebook value ", i, " is ", book.values[i]);
    if (i > 0 && !(book.values[i - 1] < book.values[i])) {
      fail(op, ": codebook values must ascend, but value ", i - 1, " is ", book.values[i - 1],
           " and value ", i, " is ", book.values[i]);
    }
  }
}

void validate(const char* op, int64_t rows, int64_t cols, int64_t block_size) {
  if (rows < 0 || cols < 0) fail(op, ": the weight is ", rows, " x ", cols);
  int64_t bits = 0;
  if (__builtin_mul_overflow(rows, cols, &bits) ||
      __builtin_mul_overflow(bits, int64_t{8}, &bits)) {
    fail(op, ": the weight's ", rows, " x ", cols, " elements overflow 64 bits");
  }
  if (!is_valid_block_size(block_size)) {
    fail(op, ": block_size ", block_size, " is not a power of two from ", kMinBlockSize, " to ",
         kMaxBlockSize);
  }
}

void validate(const QuantizeArgs& args) {
  constexpr const char* kOp = "quantize_4bit";
  check_quantized(kOp, args.output);
  check_vector(kOp, "the input", args.input, args.output.numel(), args.output.device);
  if (args.pinned_offset != nullptr && !args.output.absmax.is_double_quantized()) {
    fail(kOp, ": an offset is given, but double quantization is off");
  }
}

void validate(const DequantizeArgs& args) {
  constexpr const char* kOp = "dequantize_4bit";
  check_quantized(kOp, args.weight);
  const MutableVectorView& out = args.output;
  check_vector(kOp, "the output", {out.data, out.size, out.dtype, out.device}, args.weight.numel(),
               args.weight.device);
}

void validate(const MatmulArgs& args) {
  constexpr const char* kOp = "matmul_4bit";
  const QuantizedView& w = args.weight;
  check_quantized(kOp, w);
  check_matrix(kOp, "x", args.x, w.device);
  check_matrix(kOp, "y", as_const(args.y), w.device);
  if (args.x.cols != w.cols) {
    fail(kOp, ": x is ", args.x.rows, " x ", args.x.cols, " but the weight is ", w.rows, " x ",
         w.cols, ": K = ", args.x.cols, " and K = ", w.cols, " differ");
  }
  if (args.y.rows != args.x.rows || args.y.cols != w.rows) {
    fail(kOp, ": y is ", args.y.rows, " x ", args.y.cols, ", expected ", args.x.rows, " x ",
         w.rows);
  }
  if (args.y.dtype != args.x.dtype) {
    fail(kOp, ": x is ", name(args.x.dtype), " but y is ", name(args.y.dtype));
  }
  if (args.bias.data != nullptr) {
    check_vector(kOp, "the bias", args.bias, w.rows, w.device);
    if (args.bias.dtype != args.x.dtype) {
      fail(kOp, ": x is ", name(args.x.dtype), " but the bias is ", name(args.bias.dtype));
    }
  }
}

void validate(const MatmulTransposedArgs& args) {
  constexpr const char* kOp = "matmul_4bit_transposed";
  const QuantizedView& w = args.weight;
  check_quantized(kOp, w);
  check_matrix(kOp, "dy", args.dy, w.device);
  check_matrix(kOp, "dx", as_const(args.dx), w.device);
  if (args.dy.cols != w.rows) {
    fail(kOp, ": dy is ", args.dy.rows, " x ", args.dy.cols, " but the weight is ", w.rows, " x ",
         w.cols, ": N = ", args.dy.cols, " and N = ", w.rows, " differ");
  }
  if (args.dx.rows != args.dy.rows || args.dx.cols != w.cols) {
    fail(kOp, ": dx is ", args.dx.rows, " x ", args.dx.cols, ", expected ", args.dy.rows, " x ",
         w.cols);
  }
  if (args.dx.dtype != args.dy.dtype) {
    fail(kOp, ": dy is ", name(args.dy.dtype), " but dx is ", name(args.dx.dtype));
  }
}

}  // namespace qlora_native
