// Dequantization: the driver and the reference kernel.
#include <algorithm>

#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kElementsPerTask = 64 * 1024;

}  // namespace

void decode_elements(const QuantizedView& weight, int64_t begin, int64_t count, float* out) {
  for (int64_t e = begin; e < begin + count; ++e) {
    const float value = weight.codebook.values[code_at(weight.packed, e)];
    out[e - begin] = value * block_absmax(weight.absmax, e / weight.block_size);
  }
}

void decode_blocks_scalar(const DequantizeArgs& args, int64_t first, int64_t last) {
  const QuantizedView& weight = args.weight;
  const int64_t end = std::min(last * weight.block_size, weight.numel());
  for (int64_t e = first * weight.block_size; e < end; ++e) {
    float value;
    decode_elements(weight, e, 1, &value);
    store_element(args.output.data, e, args.output.dtype, value);
  }
}

void run_dequantize(const DequantizeArgs& args, DecodeBlocksFn decode) {
  const int64_t block_size = args.weight.block_size;
  parallel_for(num_blocks(args.weight.numel(), block_size),
               std::max<int64_t>(1, kElementsPerTask / block_size),
               [&](int64_t first, int64_t last) { decode(args, first, last); });
}

}  // namespace qlora_native::cpu
