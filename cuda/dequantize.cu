// output[e] = round(codebook.values[code(e)] * absmax(e / block_size)), the product in fp32.
//
// One launch, the nested absmax included.
//
// A warp decodes a chunk of 1024 consecutive elements, a lane 32 of them: one 16-byte load of codes
// and one scale, since block sizes are multiples of 32. The results go to shared memory and from
// there to global memory as one piece of 2 KB (4 KB of fp32; device/async_copy.cuh). Grid: a thread
// block of 8 warps per 8 chunks. Small, short-lived thread blocks keep the writes of the whole
// device close together: loops over more chunks, with the next ones loaded ahead, were slower
// (bench/NOTES.md).
//
// Layouts: element e is a nibble of packed[e / 2] (even e: the high one), block e / block_size,
// group block / 256. In shared memory a chunk lies as in global memory. A lane's 16-byte vectors are
// 64 (128) bytes from its neighbour's: each lane begins with another one of its vectors, so that
// eight lanes write to eight places of 128 bytes. Pointers that are not aligned to 16 bytes take
// narrow accesses (kAligned = false), as does a chunk that the array's end cuts off.
//
// Bytes moved per element: 1/2 + scales (1/64 with double quantization at block size 64, 1/16 with
// fp32 absmax) + sizeof(T). Bound: memory. Needed at 4.3 TB/s: 7.4 elements per clock and SM for
// 16-bit outputs; the table's reads allow 32.
#include <cstdint>

#include "device/async_copy.cuh"
#include "device/decode.cuh"
#include "device/grid_dependency.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "host/compiled_architecture.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLaneElems = 32;
constexpr int kChunk = kWarpSize * kLaneElems;
template <class T>
constexpr int kBlocksPerSm = sizeof(T) == 2 ? 8 : 4;

/// Larger outputs than any L2 cache: what is written first is gone when the kernel ends.
constexpr int64_t kCachedBytes = int64_t{64} << 20;

template <class T>
struct DequantizeParams {
  const uint8_t* packed;
  BlockScales scales;
  Codebook codebook;
  T* output;
  int64_t numel;
};

/// The codes of a lane's elements, `elem` the first, as four words in memory order.
template <bool kAligned, class T>
__device__ __forceinline__ void load_codes(const DequantizeParams<T>& p, int64_t elem,
                                           uint32_t (&words)[4]) {
  const uint8_t* const source = p.packed + elem / 2;
  if (kAligned && elem + kLaneElems <= p.numel) {
    const uint4 vector = load_streaming_after_wait(reinterpret_cast<const uint4*>(source));
    words[0] = vector.x;
    words[1] = vector.y;
    words[2] = vector.z;
    words[3] = vector.w;
    return;
  }
  const int64_t bytes = packed_bytes(p.numel) - elem / 2;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    words[word] = 0;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
      if (4 * word + byte < bytes) {
        words[word] |= static_cast<uint32_t>(source[4 * word + byte]) << (8 * byte);
      }
    }
  }
}

/// Decodes a lane's elements to its part of `chunk`.
template <class T>
__device__ __forceinline__ void decode_lane(const LookupTable& table, const uint32_t (&words)[4],
                                            float absmax, T* chunk) {
  constexpr int kElems = kVectorElems<T>;
  constexpr int kVectors = kLaneElems / kElems;  // 4, or 8 of fp32
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = (i + (kVectors == 4 ? lane / 2 : lane)) % kVectors;
    const int place = v * kElems / 8;  // of the word
    const uint32_t low = place % 2 == 0 ? words[0] : words[1];
    const uint32_t high = place % 2 == 0 ? words[2] : words[3];
    uint32_t word = place / 2 == 0 ? low : high;
    if constexpr (kElems == 4) word >>= v % 2 * 16;
    float weights[kElems];
    decode_word(table, word, weights);
    Vector<T> vector;
#pragma unroll
    for (int j = 0; j < kElems; ++j) vector.elems[j] = from_float<T>(__fmul_rn(weights[j], absmax));
    *reinterpret_cast<Vector<T>*>(chunk + lane * kLaneElems + v * kElems) = vector;
  }
}

template <class T, bool kDoubleQuant, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    dequantize_kernel(const __grid_constant__ DequantizeParams<T> p) {
  __shared__ LookupTable table;
  __shared__ float map[kDoubleQuant ? 256 : 1];
  __shared__ alignas(128) T chunks[kWarps][kChunk];
  allow_next_kernel();
  table.fill(p.codebook);
  if constexpr (kDoubleQuant) map[threadIdx.x] = kDynamicMapOnDevice.values[threadIdx.x];
  wait_for_previous_kernel();

  const ScaleReader<kDoubleQuant, LoadsAfterWait> scales(p.scales);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kChunk;
  const int64_t elem = first + lane * kLaneElems;
  uint32_t words[4];
  RawScale raw{};
  if (elem < p.numel) {
    load_codes<kAligned>(p, elem, words);
    raw = scales.load(elem);
  }
  __syncthreads();
  if (first >= p.numel) return;

  T* const chunk = chunks[warp];
  if (elem < p.numel) decode_lane(table, words, scales.decode(raw, map), chunk);
  if (kAligned && first + kChunk <= p.numel) {
    const bool evict_first = p.numel * static_cast<int64_t>(sizeof(T)) > kCachedBytes;
    store_by_warp<kChunk * sizeof(T)>(p.output + first, chunk, evict_first);
  } else {
    __syncwarp();
    const auto count = static_cast<int>(min(p.numel - first, int64_t{kChunk}));
    for (int i = lane; i < count; i += kWarpSize) p.output[first + i] = chunk[i];
  }
}

}  // namespace

void dequantize_simt(const DequantizeArgs& args, Workspace, Stream stream) {
  const QuantizedView& weight = args.weight;
  const DeviceGuard guard(weight.device.index);
  visit_dtype(args.output.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const DequantizeParams<T> params{weight.packed, block_scales(weight), weight.codebook,
                                     static_cast<T*>(args.output.data), weight.numel()};
    const bool aligned = is_aligned(params.output, 16) && is_aligned(params.packed, 16);
    visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
      visit_bool(aligned, [&](auto is_vector) {
        launch("dequantize_4bit simt",
               dequantize_kernel<T, decltype(double_quant)::value, decltype(is_vector)::value>,
               {.grid = ceil_div(weight.numel(), int64_t{kWarps} * kChunk),
                .block = kThreads,
                .overlaps_previous = is_compiled_for_hopper(weight.device.index)},
               to_cuda(stream), params);
      });
    });
  });
}

}  // namespace qlora_native::cuda
