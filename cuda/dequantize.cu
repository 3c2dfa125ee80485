// output[e] = round(codebook.values[code(e)] * absmax(e / block_size)), the product in fp32.
//
// One launch, the nested absmax included.
//
// Grid: one thread block of 256 threads per tile of 256 * kItems items; an item is the elements of
// one 16-byte store (8 of a 16-bit type, 4 of fp32) and thread t owns items t, t + 256, ... of the
// tile, so that a warp reads 128 (64) consecutive bytes of codes and writes 512 consecutive bytes.
// An item lies in one quantization block, since block sizes are multiples of 32.
//
// Each thread first issues all its loads (codes, then scales), and the table is filled meanwhile:
// the latencies of kItems items overlap.
//
// Layouts: element e is a nibble of packed[e / 2] (even e: the high one), block e / block_size,
// group block / 256. Pointers that are not aligned for the wide accesses take narrow ones
// (kAligned = false): same indices.
//
// Bytes moved per element: 1/2 + scales (1/64 with double quantization at block size 64, 1/16 with
// fp32 absmax) + sizeof(T). Bound: memory. Needed at 4.3 TB/s: 7.4 elements per clock and SM for
// 16-bit outputs; the table's reads allow 32.
#include <cstdint>

#include "device/decode.cuh"
#include "device/vec_load.cuh"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 4;

template <class T>
struct DequantizeParams {
  const uint8_t* packed;
  BlockScales scales;
  Codebook codebook;
  T* output;
  int64_t numel;
};

/// The codes of one item in memory order: four bytes, or two when T is fp32.
template <bool kAligned, class T>
__device__ __forceinline__ uint32_t load_item_codes(const uint8_t* source) {
  constexpr int kBytes = kVectorElems<T> / 2;
  if constexpr (kAligned && kBytes == 4) {
    return load_streaming(reinterpret_cast<const uint32_t*>(source));
  } else if constexpr (kAligned) {
    return load_streaming(reinterpret_cast<const uint16_t*>(source));
  } else {
    uint32_t word = 0;
#pragma unroll
    for (int byte = 0; byte < kBytes; ++byte)
      word |= static_cast<uint32_t>(source[byte]) << (8 * byte);
    return word;
  }
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_item(T* target, const float (&weights)[8], float absmax) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kVectorElems<T>; ++i) {
    vector.elems[i] = from_float<T>(__fmul_rn(weights[i], absmax));
  }
  if constexpr (kAligned) {
    *reinterpret_cast<Vector<T>*>(target) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < kVectorElems<T>; ++i) target[i] = vector.elems[i];
  }
}

/// One tile. `kFull`: it lies inside the array, so that nothing is guarded and the items
/// interleave.
template <bool kFull, bool kAligned, class T, bool kDoubleQuant>
__device__ __forceinline__ void decode_tile(const DequantizeParams<T>& p,
                                            const ScaleReader<kDoubleQuant>& scales, int64_t first,
                                            LookupTable& table) {
  constexpr int kElems = kVectorElems<T>;
  constexpr int64_t kStride = int64_t{kThreads} * kElems;
  const auto is_whole = [&](int64_t elem) { return kFull || elem + kElems <= p.numel; };

  uint32_t codes[kItems];
  RawScale raw[kItems];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t elem = first + item * kStride;
    if (is_whole(elem)) {
      codes[item] = load_item_codes<kAligned, T>(p.packed + elem / 2);
      raw[item] = scales.load(elem);
    }
  }
  table.fill(p.codebook);
  __syncthreads();

#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t elem = first + item * kStride;
    if (is_whole(elem)) {
      float weights[8];
      decode8(table, codes[item], weights);
      store_item<kAligned>(p.output + elem, weights, scales.decode(raw[item]));
    } else if (elem < p.numel) {
      // The array's last item is short.
      const float absmax = scales.decode(scales.load(elem));
      for (int64_t e = elem; e < p.numel; ++e) {
        p.output[e] = from_float<T>(__fmul_rn(table[load_code(p.packed, e)], absmax));
      }
    }
  }
}

template <class T, bool kDoubleQuant, bool kAligned>
__global__ void __launch_bounds__(kThreads, 6)
    dequantize_kernel(const __grid_constant__ DequantizeParams<T> p) {
  constexpr int kElems = kVectorElems<T>;
  constexpr int64_t kTile = int64_t{kThreads} * kItems * kElems;
  __shared__ LookupTable table;
  const ScaleReader<kDoubleQuant> scales(p.scales);
  const int64_t tile = blockIdx.x * kTile;
  const int64_t first = tile + static_cast<int64_t>(threadIdx.x) * kElems;
  if (tile + kTile <= p.numel) {
    decode_tile<true, kAligned>(p, scales, first, table);
  } else {
    decode_tile<false, kAligned>(p, scales, first, table);
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
    const bool aligned = is_aligned(params.output, 16) && is_aligned(params.packed, 4);
    visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
      visit_bool(aligned, [&](auto is_vector) {
        launch("dequantize_4bit simt",
               dequantize_kernel<T, decltype(double_quant)::value, decltype(is_vector)::value>,
               {ceil_div(weight.numel(), int64_t{kThreads} * kItems * kVectorElems<T>), kThreads},
               to_cuda(stream), params);
      });
    });
  });
}

}  // namespace qlora_native::cuda
