// For every block of block_size elements x:
//   absmax = max |x|,  code = encode(x * (1 / absmax)) in fp32, IEEE rounding; zeros, NaN and
//   infinity as quantize.h says. Bytes equal to the CPU backend's.
//
// A unit is 8 consecutive elements in one thread: one 16-byte load (two for fp32), one 4-byte store
// of codes. It lies in one quantization block, since block sizes are multiples of 32.
//
// Blocks of up to 256 elements (quantize_kernel): a warp takes 256 consecutive elements, so a block
// is held by block_size / 8 neighbouring lanes, and its maximum is a butterfly over them. A thread
// block of 256 threads covers a tile of 2048 * kUnits elements; thread t owns units t, t + 256, ...
// of it. All loads are issued before the first use.
// Larger blocks (quantize_large_kernel): a warp per block, which reads it twice, the second time
// from the caches, so that registers do not limit the size.
//
// Layouts: element e of a [rows, cols] array in row-major order is a nibble of packed[e / 2] (even
// e: the high one) and belongs to block e / block_size. Pointers that are not aligned for wide
// accesses take narrow ones (kAligned = false).
//
// The maximum is taken on bit patterns without the sign: integer order is the order of finite
// floats, and infinity and NaN come out on top, so one comparison finds them.
//
// Bytes moved per element: sizeof(T) + 1/2 + 4 / block_size. Bound: issue slots, about 16 per
// element with a BucketTable (NF4, INT4) and 34 with a DecisionTree (FP4), against 17 that memory
// would allow.
#include <cstdint>
#include <type_traits>

#include "device/encode.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "double_quantize.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kUnit = 8;
constexpr int kUnits = 2;
constexpr int kWarpSpan = kWarpSize * kUnit;  // elements that a warp holds at a time
constexpr int64_t kTile = int64_t{kThreads} * kUnit * kUnits;

template <class T>
struct QuantizeParams {
  const T* input;
  uint8_t* packed;
  float* absmax;
  Codebook codebook;
  int64_t numel;
  int block_shift;  ///< log2(block_size)
};

/// The unit from element `elem`, zeros past the end: they change no maximum and encode to the zero
/// code.
template <bool kAligned, class T>
__device__ __forceinline__ void load_unit(const QuantizeParams<T>& p, int64_t elem,
                                          float (&x)[kUnit]) {
  if (elem + kUnit <= p.numel) {
    load8<kAligned>(p.input + elem, x);
  } else {
    load8_partial(p.input + elem, p.numel - elem, x);
  }
}

__device__ __forceinline__ uint32_t max_abs_bits(const float (&x)[kUnit]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) bits = max(bits, abs_bits(x[i]));
  return bits;
}

/// Encodes a unit and stores its codes, as far as the array goes.
template <bool kAligned, class T, class Encoder>
__device__ __forceinline__ void store_unit(const QuantizeParams<T>& p, const Encoder& encoder,
                                           const ScaleOf& scale, int64_t elem,
                                           const float (&x)[kUnit]) {
  if (elem >= p.numel) return;
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const uint32_t code = encoder.encode(__fmul_rn(x[i], scale.reciprocal));
    word |= code << (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
  }
  if (!scale.valid) word = 0x11111111u * p.codebook.zero_code;

  uint8_t* const target = p.packed + elem / 2;
  if (kAligned && elem + kUnit <= p.numel) {
    *reinterpret_cast<uint32_t*>(target) = word;
  } else {
    const int64_t bytes = packed_bytes(p.numel) - elem / 2;
#pragma unroll
    for (int byte = 0; byte < kUnit / 2; ++byte) {
      if (byte < bytes) target[byte] = static_cast<uint8_t>(word >> (8 * byte));
    }
  }
}

template <class T, class Encoder, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ QuantizeParams<T> p) {
  __shared__ Encoder encoder;
  const int64_t first = blockIdx.x * kTile + static_cast<int64_t>(threadIdx.x) * kUnit;
  float x[kUnits][kUnit];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) load_unit<kAligned>(p, first + u * kThreads * kUnit, x[u]);
  encoder.fill(p.codebook);
  __syncthreads();

  const int lanes_per_block = (1 << p.block_shift) / kUnit;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int64_t elem = first + u * kThreads * kUnit;
    const ScaleOf scale(group_max(max_abs_bits(x[u]), lanes_per_block));
    store_unit<kAligned>(p, encoder, scale, elem, x[u]);
    if (threadIdx.x % lanes_per_block == 0 && elem < p.numel) {
      p.absmax[elem >> p.block_shift] = scale.absmax;
    }
  }
}

template <class T, class Encoder, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    quantize_large_kernel(const __grid_constant__ QuantizeParams<T> p) {
  __shared__ Encoder encoder;
  encoder.fill(p.codebook);
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int64_t begin = block << p.block_shift;
  if (begin >= p.numel) return;
  const int spans = (1 << p.block_shift) / kWarpSpan;
  const int64_t first = begin + lane * kUnit;
  float x[kUnit];
  uint32_t max_bits = 0;
  for (int span = 0; span < spans; ++span) {
    load_unit<kAligned>(p, first + span * kWarpSpan, x);
    max_bits = max(max_bits, max_abs_bits(x));
  }
  const ScaleOf scale(group_max(max_bits, kWarpSize));
  if (lane == 0) p.absmax[block] = scale.absmax;
  for (int span = 0; span < spans; ++span) {
    load_unit<kAligned>(p, first + span * kWarpSpan, x);
    store_unit<kAligned>(p, encoder, scale, first + span * kWarpSpan, x);
  }
}

/// Bytes of the workspace that the fp32 absmax takes, rounded up so that fp64 values can follow.
int64_t absmax_bytes(int64_t blocks) {
  return ceil_div(blocks * static_cast<int64_t>(sizeof(float)), 16) * 16;
}

template <class T, class Encoder, bool kAligned>
void launch_quantize(const QuantizeParams<T>& params, cudaStream_t stream) {
  const int64_t block_size = int64_t{1} << params.block_shift;
  if (block_size <= kWarpSpan) {
    launch("quantize_4bit simt", quantize_kernel<T, Encoder, kAligned>,
           {ceil_div(params.numel, kTile), kThreads}, stream, params);
  } else {
    launch("quantize_4bit simt (large blocks)", quantize_large_kernel<T, Encoder, kAligned>,
           {ceil_div(num_blocks(params.numel, block_size), kWarps), kThreads}, stream, params);
  }
}

}  // namespace

int64_t quantize_simt_workspace_bytes(const QuantizeArgs& args) {
  if (!args.output.absmax.is_double_quantized()) return 0;
  const int64_t blocks = num_blocks(args.output.numel(), args.output.block_size);
  return absmax_bytes(blocks) + double_quantize_scratch_bytes(blocks);
}

void quantize_simt(const QuantizeArgs& args, Workspace workspace, Stream stream) {
  const MutableQuantizedView& out = args.output;
  const DeviceGuard guard(out.device.index);
  const bool double_quant = out.absmax.is_double_quantized();
  float* const absmax = double_quant ? static_cast<float*>(workspace.data) : out.absmax.values;
  visit_dtype(args.input.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const QuantizeParams<T> params{static_cast<const T*>(args.input.data),
                                   out.packed,
                                   absmax,
                                   out.codebook,
                                   out.numel(),
                                   block_shift(out.block_size)};
    const bool aligned = is_aligned(params.input, 16) && is_aligned(params.packed, 4);
    visit_bool(BucketTable::fits(out.codebook), [&](auto fits) {
      using Encoder = std::conditional_t<decltype(fits)::value, BucketTable, DecisionTree>;
      visit_bool(aligned, [&](auto is_vector) {
        launch_quantize<T, Encoder, decltype(is_vector)::value>(params, to_cuda(stream));
      });
    });
  });
  if (double_quant) {
    const int64_t blocks = num_blocks(out.numel(), out.block_size);
    double_quantize(absmax, blocks, args.pinned_offset, out.absmax,
                    static_cast<char*>(workspace.data) + absmax_bytes(blocks), to_cuda(stream));
  }
}

}  // namespace qlora_native::cuda
