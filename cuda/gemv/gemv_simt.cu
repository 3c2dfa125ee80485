// Y[M,N] = X[M,K] * W[N,K]^T + bias for few rows of X, on the CUDA cores, fp32 accumulation.
//
// Vectorized kernel (K a multiple of 32, packed codes 16-byte aligned).
//   Grid: weight_tiles * x_tiles thread blocks of 8 warps. A warp owns kWeightRows rows of W and
//   the kXRows rows of X of its thread block, for the whole of K: no partial sums leave the warp.
//   Along K a warp takes 1024 elements at a time: lane l has the 32 elements from l * 32 of each
//   row, one 16-byte load of codes. They lie in one quantization block, so their products are
//   summed unscaled and multiplied by absmax once. The next codes are loaded before the current are
//   used. (Without the scale, |x| up to 1e36 cannot overflow a sum of 32.) X is staged in shared
//   memory, in its own type, stage_k elements per row at a time. Vector q of 16 bytes of a row lies
//   at position q ^ ((q >> 3) & 7): the lanes of a warp, which read at strides of 64 (128) bytes,
//   then meet no bank conflict.
//
// Bytewise kernel (any K, any alignment): a warp per row of W, lane l has elements l, l + 32, ... .
//
// The sum over lanes is a butterfly of fixed order: the same arguments give the same bits.
//
// Bytes moved: N * K * (1/2 + scales) + M * K * sizeof(T) per x tile + M * N * sizeof(T). Bound for
// M = 1: the reads of the decoding table, 32 values per clock and SM, and issue slots (about 5.5
// per value); memory would allow 36.
#include "gemv/heuristics.h"

#include <cstdint>

#include "device/decode.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kThreads = kGemvWarps * kWarpSize;
constexpr int kLaneElems = 32;  // of one 16-byte load
constexpr int kStep = kWarpSize * kLaneElems;
static_assert(kGemvStep == kStep, "stages hold whole steps of a warp");

template <class T>
struct GemvParams {
  const T* x;
  int64_t x_stride;
  const uint8_t* packed;
  BlockScales scales;
  Codebook codebook;
  const T* bias;
  T* y;
  int64_t y_stride;
  int64_t m, n, k;
  int64_t weight_tiles;
  int stage_k;
  bool x_is_aligned;  ///< every row of x starts at a multiple of 16 bytes
};

/// Vectors from one staged row to the next: the offsets of the rows are compile-time constants.
template <class T, int kXRows>
inline constexpr int kStageStride =
    static_cast<int>(gemv_stage_capacity(kXRows, sizeof(T)) / kVectorElems<T>);

/// Where vector q of a staged row lies.
__device__ __forceinline__ uint32_t swizzled(uint32_t q) { return q ^ ((q >> 3) & 7); }

/// Copies x[m0 .. m0 + kXRows, k0 .. k0 + stage_k] to shared memory, zeros where there is no
/// element.
template <class T, int kXRows>
__device__ __forceinline__ void stage_x(const GemvParams<T>& p, int64_t m0, int64_t k0,
                                        uint4* stage) {
  constexpr int kElems = kVectorElems<T>;
  const uint32_t vectors_per_row = static_cast<uint32_t>(p.stage_k) / kElems;
#pragma unroll
  for (int row = 0; row < kXRows; ++row) {
    const T* source = p.x + (m0 + row) * p.x_stride + k0;
    for (uint32_t q = threadIdx.x; q < vectors_per_row; q += kThreads) {
      uint4 vector{};
      if (m0 + row < p.m && k0 + int64_t{q} * kElems < p.k) {
        // K is a multiple of 32 here: a vector is inside the row or outside.
        if (p.x_is_aligned) {
          vector = reinterpret_cast<const uint4*>(source)[q];
        } else {
          Vector<T> elems;
#pragma unroll
          for (int i = 0; i < kElems; ++i) elems.elems[i] = source[q * kElems + i];
          vector = *reinterpret_cast<const uint4*>(&elems);
        }
      }
      stage[row * kStageStride<T, kXRows> + swizzled(q)] = vector;
    }
  }
}

template <class T>
__device__ __forceinline__ void store_y(const GemvParams<T>& p, int64_t row, int64_t col,
                                        float sum) {
  if (p.bias != nullptr) sum += to_float(p.bias[col]);
  p.y[row * p.y_stride + col] = from_float<T>(sum);
}

/// Thread blocks per SM that the registers must leave room for: as many as fit without spilling.
template <class T, int kXRows>
inline constexpr int kMinBlocksPerSm = kXRows == 1                ? 4
                                       : kXRows * sizeof(T) <= 16 ? 2
                                                                  : 1;

template <class T, int kXRows, int kWeightRows, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<T, kXRows>)
    gemv_kernel(const __grid_constant__ GemvParams<T> p) {
  constexpr int kVectorsPerWord = 8 / kVectorElems<T>;  // of x, for one 32-bit word of codes
  __shared__ LookupTable table;
  extern __shared__ uint4 stage[];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t n0 = (blockIdx.x % p.weight_tiles * kGemvWarps + warp) * kWeightRows;
  const int64_t m0 = blockIdx.x / p.weight_tiles * kXRows;
  const ScaleReader<kDoubleQuant> scales(p.scales);
  table.fill(p.codebook);

  // Rows past the last read the last one again, and are not stored.
  uint64_t row_elem[kWeightRows];
#pragma unroll
  for (int r = 0; r < kWeightRows; ++r) {
    row_elem[r] = static_cast<uint64_t>((n0 + r < p.n ? n0 + r : p.n - 1) * p.k);
  }
  uint4 next_codes[kWeightRows];
  RawScale next_raw[kWeightRows];
  const auto fetch = [&](int64_t k) {
    if (k >= p.k) return;
#pragma unroll
    for (int r = 0; r < kWeightRows; ++r) {
      const uint64_t elem = row_elem[r] + static_cast<uint64_t>(k);
      next_codes[r] = load_streaming(reinterpret_cast<const uint4*>(p.packed + elem / 2));
      next_raw[r] = scales.load(elem);
    }
  };

  float sums[kWeightRows][kXRows] = {};
  fetch(lane * kLaneElems);
  for (int64_t k0 = 0; k0 < p.k; k0 += p.stage_k) {
    __syncthreads();  // the previous stage has been read
    stage_x<T, kXRows>(p, m0, k0, stage);
    __syncthreads();
    const int staged = p.k - k0 < p.stage_k ? static_cast<int>(p.k - k0) : p.stage_k;
    for (int k = lane * kLaneElems; k < staged; k += kStep) {
      // The lane's vectors are first_vector ^ 0, ^ 1, ...: a lane's share is a power of two of
      // them, so that counting up and swizzling are exclusive-ors of different bits.
      const uint32_t first_vector = swizzled(static_cast<uint32_t>(k) / kVectorElems<T>);
      uint32_t words[kWeightRows][4];
      RawScale raw[kWeightRows];
#pragma unroll
      for (int r = 0; r < kWeightRows; ++r) {
        words[r][0] = next_codes[r].x;
        words[r][1] = next_codes[r].y;
        words[r][2] = next_codes[r].z;
        words[r][3] = next_codes[r].w;
        raw[r] = next_raw[r];
      }
      fetch(k0 + k + kStep);
      float absmax[kWeightRows];
#pragma unroll
      for (int r = 0; r < kWeightRows; ++r) absmax[r] = scales.decode(raw[r]);

      float partial[kWeightRows][kXRows] = {};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float weights[kWeightRows][8];
#pragma unroll
        for (int r = 0; r < kWeightRows; ++r) decode8(table, words[r][word], weights[r]);
#pragma unroll
        for (int row = 0; row < kXRows; ++row) {
          float x[8];
#pragma unroll
          for (int v = 0; v < kVectorsPerWord; ++v) {
            const uint32_t vector = first_vector ^ (word * kVectorsPerWord + v);
            unpack<T>(stage[row * kStageStride<T, kXRows> + vector], x + v * kVectorElems<T>);
          }
#pragma unroll
          for (int r = 0; r < kWeightRows; ++r) {
#pragma unroll
            for (int i = 0; i < 8; ++i)
              partial[r][row] = fmaf(weights[r][i], x[i], partial[r][row]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kWeightRows; ++r) {
#pragma unroll
        for (int row = 0; row < kXRows; ++row) {
          sums[r][row] = fmaf(partial[r][row], absmax[r], sums[r][row]);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kWeightRows; ++r) {
#pragma unroll
    for (int row = 0; row < kXRows; ++row) {
      const float sum = warp_sum(sums[r][row]);
      if (lane == 0 && n0 + r < p.n && m0 + row < p.m) store_y(p, m0 + row, n0 + r, sum);
    }
  }
}

template <class T, int kXRows, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads)
    gemv_bytewise_kernel(const __grid_constant__ GemvParams<T> p) {
  __shared__ LookupTable table;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t n = blockIdx.x % p.weight_tiles * kGemvWarps + warp;
  const int64_t m0 = blockIdx.x / p.weight_tiles * kXRows;
  const ScaleReader<kDoubleQuant> scales(p.scales);
  table.fill(p.codebook);
  __syncthreads();
  if (n >= p.n) return;

  float sums[kXRows] = {};
  for (int64_t k = lane; k < p.k; k += kWarpSize) {
    const int64_t elem = n * p.k + k;
    const float weight =
        __fmul_rn(table[load_code(p.packed, elem)], scales.decode(scales.load(elem)));
#pragma unroll
    for (int row = 0; row < kXRows; ++row) {
      if (m0 + row < p.m) {
        sums[row] = fmaf(weight, to_float(p.x[(m0 + row) * p.x_stride + k]), sums[row]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kXRows; ++row) {
    const float sum = warp_sum(sums[row]);
    if (lane == 0 && m0 + row < p.m) store_y(p, m0 + row, n, sum);
  }
}

GemvProblem problem_of(const MatmulArgs& args) {
  return {args.x.rows, args.weight.rows, args.weight.cols, size_bytes(args.x.dtype),
          is_aligned(args.weight.packed, 16)};
}

template <class T, bool kDoubleQuant, int kXRows>
void launch_gemv(const GemvPlan& plan, const GemvParams<T>& params, cudaStream_t stream) {
  if (plan.vectorized) {
    launch("matmul_4bit gemv_simt", gemv_kernel<T, kXRows, kGemvWeightRows, kDoubleQuant>,
           {plan.grid, kThreads, static_cast<size_t>(plan.shared_bytes)}, stream, params);
  } else {
    launch("matmul_4bit gemv_simt (bytewise)", gemv_bytewise_kernel<T, kXRows, kDoubleQuant>,
           {plan.grid, kThreads}, stream, params);
  }
}

template <class T, bool kDoubleQuant>
void launch_gemv(const GemvPlan& plan, const GemvParams<T>& params, cudaStream_t stream) {
  switch (plan.x_rows) {
    case 1:
      return launch_gemv<T, kDoubleQuant, 1>(plan, params, stream);
    case 2:
      return launch_gemv<T, kDoubleQuant, 2>(plan, params, stream);
    case 4:
      return launch_gemv<T, kDoubleQuant, 4>(plan, params, stream);
    default:
      return launch_gemv<T, kDoubleQuant, 8>(plan, params, stream);
  }
}

}  // namespace

bool prefers_gemv(const MatmulArgs& args) { return gemv_is_preferred(problem_of(args)); }

void gemv_simt(const MatmulArgs& args, Workspace, Stream stream) {
  const QuantizedView& weight = args.weight;
  const DeviceGuard guard(weight.device.index);
  const GemvPlan plan = plan_gemv(problem_of(args));
  visit_dtype(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GemvParams<T> params{
        static_cast<const T*>(args.x.data),
        args.x.row_stride,
        weight.packed,
        block_scales(weight),
        weight.codebook,
        static_cast<const T*>(args.bias.data),
        static_cast<T*>(args.y.data),
        args.y.row_stride,
        args.x.rows,
        weight.rows,
        weight.cols,
        plan.weight_tiles,
        static_cast<int>(plan.stage_k),
        is_aligned(args.x.data, 16) && args.x.row_stride % kVectorElems<T> == 0};
    visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
      launch_gemv<T, decltype(double_quant)::value>(plan, params, to_cuda(stream));
    });
  });
}

}  // namespace qlora_native::cuda
