// Quantization: the driver and the reference kernel.
#include <algorithm>

#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

/// Elements that one call of a worker takes: long enough to hide the hand-over, short enough to
/// share a 1-million-element weight among many threads.
constexpr int64_t kElementsPerTask = 64 * 1024;

constexpr int64_t align_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

void encode_blocks_scalar(const QuantizeArgs& args, int64_t first, int64_t last, float* absmax) {
  const MutableQuantizedView& out = args.output;
  const DType dtype = args.input.dtype;
  const int64_t numel = out.numel();
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * out.block_size;
    const int64_t end = std::min(begin + out.block_size, numel);

    float largest = 0.0f;
    bool all_finite = true;
    for (int64_t e = begin; e < end; ++e) {
      const float x = load_element(args.input.data, e, dtype);
      all_finite = all_finite && is_finite(x);
      largest = std::max(largest, std::fabs(x));
    }
    const float reciprocal = 1.0f / largest;  // infinite for 0 and for the smallest subnormals
    const bool has_codes = all_finite && is_finite(reciprocal);
    absmax[block] = !all_finite ? bits_float(kQuietNan) : has_codes ? largest : 0.0f;

    const auto encode = [&](int64_t e) {
      if (e >= end || !has_codes) return out.codebook.zero_code;
      return encode_4bit(out.codebook, load_element(args.input.data, e, dtype) * reciprocal);
    };
    for (int64_t e = begin; e < end; e += 2)
      out.packed[e / 2] = pack_nibbles(encode(e), encode(e + 1));
  }
}

int64_t quantize_workspace_bytes(const QuantizeArgs& args) {
  if (!args.output.absmax.is_double_quantized()) return 0;
  const int64_t blocks = num_blocks(args.output.numel(), args.output.block_size);
  return align_up(blocks * int64_t{sizeof(float)}) + num_groups(blocks) * int64_t{sizeof(double)};
}

void run_quantize(const QuantizeArgs& args, Workspace workspace, EncodeBlocksFn encode) {
  const MutableQuantizedView& out = args.output;
  const int64_t blocks = num_blocks(out.numel(), out.block_size);
  const bool nested = out.absmax.is_double_quantized();
  float* absmax = nested ? static_cast<float*>(workspace.data) : out.absmax.values;
  parallel_for(blocks, std::max<int64_t>(1, kElementsPerTask / out.block_size),
               [&](int64_t first, int64_t last) { encode(args, first, last, absmax); });
  if (!nested) return;
  auto* partials = reinterpret_cast<double*>(static_cast<char*>(workspace.data) +
                                             align_up(blocks * int64_t{sizeof(float)}));
  double_quantize(absmax, blocks, args.pinned_offset, out.absmax, partials);
}

}  // namespace qlora_native::cpu
