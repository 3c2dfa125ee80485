#include "validate.h"

#include <cmath>

#include "argument_checks.h"
#include "validation_failure.h"

namespace qlora_native {
namespace {

/// X [M, K], W [N, K], Y [M, N].
void check_product_shapes(const char* op, const MatrixView& x, const MatrixView& y,
                          const QuantizedView& w) {
  if (x.cols != w.cols) {
    fail(op, ": x is ", x.rows, " x ", x.cols, " but the weight is ", w.rows, " x ", w.cols,
         ": K = ", x.cols, " and K = ", w.cols, " differ");
  }
  if (y.rows != x.rows || y.cols != w.rows) {
    fail(op, ": y is ", y.rows, " x ", y.cols, ", expected ", x.rows, " x ", w.rows);
  }
  if (y.dtype != x.dtype) {
    fail(op, ": x is ", name(x.dtype), " but y is ", name(y.dtype));
  }
}

/// dY [M, N], W [N, K], dX [M, K].
void check_transposed_shapes(const char* op, const MatrixView& dy, const MatrixView& dx,
                             const QuantizedView& w) {
  if (dy.cols != w.rows) {
    fail(op, ": dy is ", dy.rows, " x ", dy.cols, " but the weight is ", w.rows, " x ", w.cols,
         ": N = ", dy.cols, " and N = ", w.rows, " differ");
  }
  if (dx.rows != dy.rows || dx.cols != w.cols) {
    fail(op, ": dx is ", dx.rows, " x ", dx.cols, ", expected ", dy.rows, " x ", w.cols);
  }
  if (dx.dtype != dy.dtype) {
    fail(op, ": dy is ", name(dy.dtype), " but dx is ", name(dx.dtype));
  }
}

/// A stride that reaches past the part of one matrix, without leaving 64 bits for the last.
void check_stride(const char* op, const char* what, int64_t stride, int64_t least, int64_t count) {
  int64_t bytes = 0;
  if (stride < least) {
    fail(op, ": ", what, " has stride ", stride, ", less than the ", least, " of one matrix");
  }
  if (__builtin_mul_overflow(stride, count, &bytes) ||
      __builtin_mul_overflow(bytes, int64_t{sizeof(float)}, &bytes)) {
    fail(op, ": ", what, " of ", count, " matrices at stride ", stride, " overflows 64 bits");
  }
}

void check_stack(const char* op, const QuantizedStackView& stack) {
  const QuantizedView& first = stack.first;
  if (stack.count < 0) fail(op, ": there are ", stack.count, " matrices");
  if (stack.count == 0) {
    validate(op, first.rows, first.cols, first.block_size);
    return validate(op, first.codebook);
  }
  check_quantized(op, first);
  if (stack.count == 1) return;
  const int64_t blocks = num_blocks(first.numel(), first.block_size);
  check_stride(op, "the packed weight", stack.packed_stride, packed_bytes(first.numel()),
               stack.count);
  check_stride(op, "absmax", stack.absmax_stride, blocks, stack.count);
  if (first.absmax.is_double_quantized()) {
    check_stride(op, "absmax2", stack.absmax2_stride, num_groups(blocks), stack.count);
    check_stride(op, "the offset", stack.offset_stride, 1, stack.count);
  }
}

void check_group_ends(const char* op, const GroupEnds& ends, const QuantizedStackView& stack,
                      int64_t rows) {
  const auto code = static_cast<int32_t>(ends.type);
  if (code < 0 || code > static_cast<int32_t>(IndexType::kInt64)) {
    fail(op, ": the ends of groups have an unknown index type code ", code);
  }
  if (ends.size != stack.count) {
    fail(op, ": there are ", ends.size, " ends of groups but ", stack.count, " matrices");
  }
  check_device(op, "the array of ends of groups", ends.device, stack.first.device, kWeight);
  check_pointer(op, "the array of ends of groups", ends.data, ends.size);
  if (!ends.device.is_cpu()) return;
  int64_t start = 0;
  for (int64_t group = 0; group < ends.size; ++group) {
    const int64_t end = ends[group];
    if (end < start || end > rows) {
      fail(op, ": group ", group, " ends at row ", end, ", after ", start, ", of ", rows, " rows");
    }
    start = end;
  }
}

}  // namespace

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
  check_product_shapes(kOp, args.x, as_const(args.y), w);
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
  check_transposed_shapes(kOp, args.dy, as_const(args.dx), w);
}

void validate(const GroupedMatmulArgs& args) {
  constexpr const char* kOp = "grouped_matmul_4bit";
  const QuantizedView& w = args.weights.first;
  check_stack(kOp, args.weights);
  check_matrix(kOp, "x", args.x, w.device);
  check_matrix(kOp, "y", as_const(args.y), w.device);
  check_product_shapes(kOp, args.x, as_const(args.y), w);
  if (args.bias.data != nullptr) {
    const MatrixView& bias = args.bias;
    check_matrix(kOp, "the bias", bias, w.device);
    if (bias.rows != args.weights.count || bias.cols != w.rows) {
      fail(kOp, ": the bias is ", bias.rows, " x ", bias.cols, ", expected ", args.weights.count,
           " x ", w.rows);
    }
    if (bias.dtype != args.x.dtype) {
      fail(kOp, ": x is ", name(args.x.dtype), " but the bias is ", name(bias.dtype));
    }
  }
  check_group_ends(kOp, args.ends, args.weights, args.x.rows);
}

void validate(const GroupedMatmulTransposedArgs& args) {
  constexpr const char* kOp = "grouped_matmul_4bit_transposed";
  const QuantizedView& w = args.weights.first;
  check_stack(kOp, args.weights);
  check_matrix(kOp, "dy", args.dy, w.device);
  check_matrix(kOp, "dx", as_const(args.dx), w.device);
  check_transposed_shapes(kOp, args.dy, as_const(args.dx), w);
  check_group_ends(kOp, args.ends, args.weights, args.dy.rows);
}

}  // namespace qlora_native
