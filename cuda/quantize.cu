// For every block of block_size elements x:
//   absmax = max |x|,  code = encode(x * (1 / absmax)) in fp32, IEEE rounding; zeros, NaN and
//   infinity as quantize.h says. Bytes equal to the CPU backend's.
//
// A lane encodes 32 consecutive elements, of one quantization block, since block sizes are
// multiples of 32: 16 bytes of codes, one store. A warp holds a chunk of 1024 elements at a time,
// which asynchronous copies bring to shared memory; a warp has kSlots chunks there, and reads the
// next ones while it encodes. The 16-byte vectors of a chunk are stored so (`swizzled`) that both
// the copies, lane by lane, and the reads, of 64 or 128 bytes by each lane, are free of bank
// conflicts.
//
// Blocks of up to 1024 elements (quantize_kernel): a block is held by block_size / 32 neighbouring
// lanes, and its maximum is a butterfly over them. A thread block of 8 warps takes a tile of
// consecutive chunks, dealt to its warps in turn: the elements of a whole group of 256 blocks up to
// block size 256, so that it leaves the group's sum for double_quantize.cu as well; 16 chunks above.
// Larger blocks (quantize_large_kernel): a warp per block, which reads it twice, the second time
// from the caches.
//
// Layouts: element e of a [rows, cols] array in row-major order is a nibble of packed[e / 2] (even
// e: the high one) and belongs to block e / block_size. Pointers that are not aligned to 16 bytes
// take narrow accesses (kAligned = false).
//
// The maximum is taken on bit patterns without the sign: integer order is the order of finite
// floats, and infinity and NaN come out on top, so one comparison finds them.
//
// Bytes moved per element: sizeof(T) + 1/2 + 4 / block_size. Bound: memory, and issue slots close
// behind: about 10 per element with a BucketTable (NF4, INT4), 30 with a DecisionTree (FP4), against
// 17 that memory allows.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "device/async_copy.cuh"
#include "device/encode.cuh"
#include "device/group_sum.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "double_quantize.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLaneElems = 32;
constexpr int kChunk = kWarpSize * kLaneElems;  // elements that a warp encodes at a time
constexpr int kMaxShuffledBlock = kChunk;
constexpr int kMaxFusedBlock = 256;  // above, a group is too much for one thread block

template <class T>
constexpr int kSlots = sizeof(T) == 2 ? 2 : 1;
/// Five: 48 registers. A sixth has no room for the chunk that is being encoded, and is slower.
template <class T>
constexpr int kBlocksPerSm = sizeof(T) == 2 ? 5 : 4;
template <class T>
constexpr int kLaneWords = kLaneElems * sizeof(T) / sizeof(uint32_t);
template <class T>
constexpr int kSlotBytes = kChunk * sizeof(T);

template <class T, class Encoder>
struct QuantizeParams {
  const T* input;
  uint8_t* packed;
  float* absmax;
  GroupSums sums;  ///< partials == nullptr: not wanted
  typename Encoder::Image encoder;
  int64_t numel;
  int64_t blocks;
  int block_shift;     ///< log2(block_size)
  int warp_chunks;     ///< chunks that a warp takes
  uint32_t zero_word;  ///< eight zero codes
};

/// Where vector `v` of a chunk lies in its slot.
__device__ __forceinline__ uint32_t swizzled(uint32_t v) { return 16 * (v ^ (v >> 3 & 7)); }

/// Starts bringing the chunk from element `first` to a slot; zeros past the end of the array: they
/// change no maximum and encode to the zero code.
template <bool kAligned, class T, class Encoder>
__device__ __forceinline__ void load_chunk(const QuantizeParams<T, Encoder>& p, int64_t first,
                                           char* slot) {
  constexpr int kElems = kVectorElems<T>;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const T* const source = p.input + first + lane * kElems;
  if (kAligned && first + kChunk <= p.numel) {
#pragma unroll
    for (int i = 0; i < kChunk / kElems / kWarpSize; ++i) {
      copy_async_16(slot + swizzled(i * kWarpSize + lane), source + i * kWarpSize * kElems);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kChunk / kElems / kWarpSize; ++i) {
    const int64_t left = p.numel - first - (i * kWarpSize + lane) * kElems;
    Vector<T> vector{};
#pragma unroll
    for (int j = 0; j < kElems; ++j) {
      if (j < left) vector.elems[j] = source[i * kWarpSize * kElems + j];
    }
    *reinterpret_cast<Vector<T>*>(slot + swizzled(i * kWarpSize + lane)) = vector;
  }
}

/// A lane's 32 elements.
template <class T>
__device__ __forceinline__ void read_chunk(const char* slot, uint32_t (&words)[kLaneWords<T>]) {
  const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int v = 0; v < kLaneWords<T> / 4; ++v) {
    const auto vector =
        *reinterpret_cast<const uint4*>(slot + swizzled(lane * (kLaneWords<T> / 4) + v));
    words[4 * v] = vector.x;
    words[4 * v + 1] = vector.y;
    words[4 * v + 2] = vector.z;
    words[4 * v + 3] = vector.w;
  }
}

/// The largest `abs_bits` of a lane's elements.
template <class T>
__device__ __forceinline__ uint32_t max_abs_bits(const uint32_t (&words)[kLaneWords<T>]) {
  if constexpr (sizeof(T) == 4) {
    uint32_t bits = 0;
#pragma unroll
    for (const uint32_t word : words) bits = max(bits, word & 0x7fffffffu);
    return bits;
  } else {
    // Two at a time. A NaN wins over everything.
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair largest = __habs2(*reinterpret_cast<const Pair*>(&words[0]));
#pragma unroll
    for (int i = 1; i < kLaneWords<T>; ++i) {
      largest = __hmax2_nan(largest, __habs2(*reinterpret_cast<const Pair*>(&words[i])));
    }
    return max(abs_bits(to_float(largest.x)), abs_bits(to_float(largest.y)));
  }
}

/// Element `i` of a lane's 32.
template <class T>
__device__ __forceinline__ float element(const uint32_t (&words)[kLaneWords<T>], int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[i]);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))));
  } else {
    return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
  }
}

/// Encodes a lane's elements, `elem` the first, and stores their codes as far as the array goes.
template <bool kAligned, class T, class Encoder>
__device__ __forceinline__ void encode_lane(const QuantizeParams<T, Encoder>& p,
                                            const Encoder& encoder, const ScaleOf& scale,
                                            int64_t elem, uint32_t (&words)[kLaneWords<T>]) {
  // The encoders take no NaN.
  if (!scale.valid) {
#pragma unroll
    for (uint32_t& word : words) word = 0;
  }
  uint32_t codes[kLaneElems / 8];
#pragma unroll
  for (int i = 0; i < kLaneElems / 8; ++i) {
    codes[i] = 0;
    // The nibble that comes to lie on top goes first: the second byte's last, ... of four bytes.
#pragma unroll
    for (int byte = 3; byte >= 0; --byte) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = element<T>(words, 8 * i + 2 * byte + half);
        codes[i] = encoder.append(codes[i], __fmul_rn(x, scale.reciprocal));
      }
    }
    if (!scale.valid) codes[i] = p.zero_word;
  }

  uint8_t* const target = p.packed + elem / 2;
  if (kAligned && elem + kLaneElems <= p.numel) {
    *reinterpret_cast<uint4*>(target) = make_uint4(codes[0], codes[1], codes[2], codes[3]);
  } else if (elem < p.numel) {
    const int64_t bytes = packed_bytes(p.numel) - elem / 2;
#pragma unroll
    for (int byte = 0; byte < kLaneElems / 2; ++byte) {
      if (byte < bytes) target[byte] = static_cast<uint8_t>(codes[byte / 4] >> (byte % 4 * 8));
    }
  }
}

template <class T, class Encoder, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    quantize_kernel(const __grid_constant__ QuantizeParams<T, Encoder> p) {
  __shared__ alignas(128) char slots[kWarps][kSlots<T>][kSlotBytes<T>];
  __shared__ typename Encoder::Table table;
  __shared__ float absmax[kGroupSize];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t tile = static_cast<int64_t>(p.warp_chunks) * kWarps * kChunk;
  const int64_t tile_first = blockIdx.x * tile;
  const auto chunk_first = [&](int i) {
    return tile_first + static_cast<int64_t>(i * kWarps + warp) * kChunk;
  };

#pragma unroll
  for (int i = 0; i < kSlots<T>; ++i) {
    if (i < p.warp_chunks) {
      load_chunk<kAligned>(p, chunk_first(i), slots[warp][i]);
    }
    copy_async_commit();
  }
  Encoder::fill(table, p.encoder);
  __syncthreads();
  const Encoder encoder(table);

  const int lanes_per_block = (1 << p.block_shift) / kLaneElems;
  for (int i = 0; i < p.warp_chunks; ++i) {
    char* const slot = slots[warp][i % kSlots<T>];
    copy_async_wait<kSlots<T> - 1>();
    __syncwarp();
    uint32_t words[kLaneWords<T>];
    read_chunk<T>(slot, words);
    __syncwarp();
    if (i + kSlots<T> < p.warp_chunks) {
      load_chunk<kAligned>(p, chunk_first(i + kSlots<T>), slot);
    }
    copy_async_commit();

    uint32_t max_bits = max_abs_bits<T>(words);
    for (int stride = 1; stride < lanes_per_block; stride *= 2) {
      max_bits = max(max_bits, __shfl_xor_sync(kAllLanes, max_bits, stride));
    }
    const ScaleOf scale(max_bits);
    const int64_t elem = chunk_first(i) + lane * kLaneElems;
    if (lane % lanes_per_block == 0) {
      absmax[static_cast<int>(elem - tile_first) >> p.block_shift] = scale.absmax;
    }
    encode_lane<kAligned>(p, encoder, scale, elem, words);
  }

  __syncthreads();
  if (warp != 0) return;
  const int tile_blocks = static_cast<int>(tile >> p.block_shift);
  const int64_t first_block = tile_first >> p.block_shift;
  float values[kSlotsPerLane];
#pragma unroll
  for (int j = 0; j < kSlotsPerLane; ++j) {
    const int slot = j * kWarpSize + lane;
    const bool is_there = slot < tile_blocks && first_block + slot < p.blocks;
    values[j] = is_there ? absmax[slot] : __uint_as_float(kNaNBits);
    if (is_there) p.absmax[first_block + slot] = values[j];
  }
  if (p.sums.partials != nullptr) sum_group(values, blockIdx.x, p.sums);
}

template <class T, class Encoder, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    quantize_large_kernel(const __grid_constant__ QuantizeParams<T, Encoder> p) {
  __shared__ alignas(128) char slots[kWarps][kSlotBytes<T>];
  __shared__ typename Encoder::Table table;
  Encoder::fill(table, p.encoder);
  __syncthreads();
  const Encoder encoder(table);

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (block >= p.blocks) return;
  const int64_t begin = block << p.block_shift;
  char* const slot = slots[warp];
  uint32_t words[kLaneWords<T>];
  const auto fetch = [&](int chunk) {
    __syncwarp();
    load_chunk<kAligned>(p, begin + static_cast<int64_t>(chunk) * kChunk, slot);
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
    read_chunk<T>(slot, words);
  };
  uint32_t max_bits = 0;
  for (int chunk = 0; chunk < p.warp_chunks; ++chunk) {
    fetch(chunk);
    max_bits = max(max_bits, max_abs_bits<T>(words));
  }
  const ScaleOf scale(group_max(max_bits, kWarpSize));
  if (lane == 0) p.absmax[block] = scale.absmax;
  for (int chunk = 0; chunk < p.warp_chunks; ++chunk) {
    fetch(chunk);
    encode_lane<kAligned>(p, encoder, scale,
                          begin + static_cast<int64_t>(chunk) * kChunk + lane * kLaneElems, words);
  }
}

/// Bytes of the workspace that the fp32 absmax takes, rounded up so that fp64 values can follow.
int64_t absmax_bytes(int64_t blocks) {
  return ceil_div(blocks * static_cast<int64_t>(sizeof(float)), 16) * 16;
}

template <class T, class Encoder, bool kAligned>
void launch_quantize(const QuantizeParams<T, Encoder>& params, cudaStream_t stream) {
  if ((1 << params.block_shift) <= kMaxShuffledBlock) {
    const int64_t tile = int64_t{params.warp_chunks} * kWarps * kChunk;
    launch("quantize_4bit simt", quantize_kernel<T, Encoder, kAligned>,
           {ceil_div(params.numel, tile), kThreads}, stream, params);
  } else {
    launch("quantize_4bit simt (large blocks)", quantize_large_kernel<T, Encoder, kAligned>,
           {ceil_div(params.blocks, kWarps), kThreads}, stream, params);
  }
}

/// Chunks that a warp takes. `whole_groups`: its thread block is to hold one group; if not, two
/// chunks, if that is not more than a group.
int warp_chunks(int64_t block_size, bool whole_groups) {
  if (block_size > kMaxShuffledBlock) return static_cast<int>(block_size / kChunk);
  const auto chunks = static_cast<int>(kGroupSize * block_size / (kWarps * kChunk));
  return whole_groups ? chunks : std::min(chunks, 2);
}

}  // namespace

int64_t quantize_simt_workspace_bytes(const QuantizeArgs& args) {
  if (!args.output.absmax.is_double_quantized()) return 0;
  const int64_t blocks = num_blocks(args.output.numel(), args.output.block_size);
  return absmax_bytes(blocks) + group_sums_bytes(blocks);
}

void quantize_simt(const QuantizeArgs& args, Workspace workspace, Stream stream) {
  const MutableQuantizedView& out = args.output;
  const DeviceGuard guard(out.device.index);
  const int64_t blocks = num_blocks(out.numel(), out.block_size);
  const bool double_quant = out.absmax.is_double_quantized();
  float* const absmax = double_quant ? static_cast<float*>(workspace.data) : out.absmax.values;
  GroupSums sums{};
  if (double_quant) {
    sums = group_sums(static_cast<char*>(workspace.data) + absmax_bytes(blocks), blocks);
  }
  const bool needs_sums = double_quant && args.pinned_offset == nullptr;
  const bool fused_sums = needs_sums && out.block_size <= kMaxFusedBlock;

  visit_dtype(args.input.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_bool(BucketTable::fits(out.codebook), [&](auto fits) {
      using Encoder = std::conditional_t<decltype(fits)::value, BucketTable, DecisionTree>;
      const QuantizeParams<T, Encoder> params{static_cast<const T*>(args.input.data),
                                              out.packed,
                                              absmax,
                                              fused_sums ? sums : GroupSums{},
                                              Encoder::image(out.codebook),
                                              out.numel(),
                                              blocks,
                                              block_shift(out.block_size),
                                              warp_chunks(out.block_size, fused_sums),
                                              0x11111111u * out.codebook.zero_code};
      visit_bool(is_aligned(params.input, 16) && is_aligned(params.packed, 16), [&](auto aligned) {
        launch_quantize<T, Encoder, decltype(aligned)::value>(params, to_cuda(stream));
      });
    });
  });
  if (!double_quant) return;
  if (needs_sums && !fused_sums) sum_groups(absmax, blocks, sums, to_cuda(stream));
  encode_absmax(absmax, blocks, args.pinned_offset, sums, out.absmax, to_cuda(stream));
}

}  // namespace qlora_native::cuda
