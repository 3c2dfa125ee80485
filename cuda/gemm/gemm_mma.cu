// Y[M,N] = X[M,K] * W[N,K]^T + bias, eight rows of X at a time, on tensor cores (mma.sync), X and Y
// in 16 bits, fp32 accumulation.
//
//   Unit: 64 elements of K, which share a scale in every row of W.
//   Step of a warp: a tile of 16 rows of W times 4 units, 2 KB of codes. An mma takes 16 rows of W
//   and 8 rows of X; a unit's 4 mma are summed unscaled, then multiplied by the rows' scales. The
//   order of k within a unit is the order in which the lanes get it from ldmatrix; x is read in
//   the same one.
//   Thread block: 16 warps, one block per SM, over consecutive tiles and a share of K. The steps of
//   the tiles, K first, are cut into 16 equal runs, one per warp: a tile can belong to several
//   warps, whose sums are added at the end.
//   Cluster: where x does not fit into shared memory, 2, 4 or 8 thread blocks share their tiles,
//   each with a part of K and of x, and add their sums through each other's shared memory.
//   Pass: as many tiles as there is space for sums.
//
// Codes come by cp.async, two steps ahead, 128 bytes of each row; 16-byte piece c of row r lies at
// piece c ^ (r % 8): no bank conflicts for ldmatrix. Scales are loaded two steps ahead, before the
// codes, and go through shared memory so that a lane decodes two of 64.
//
// All sums are made in fixed order: the same arguments give the same bits.
//
// Bytes moved: N * K * (1/2 + scales) per eight rows of X. Bound: shared memory, 35 wavefronts per 1024
// weights, 16 of them lookups.
#include <algorithm>
#include <cstdint>
#include <string>

#include "device/architecture.cuh"
#include "device/async_copy.cuh"
#include "device/cluster.cuh"
#include "device/decode.cuh"
#include "device/grid_dependency.cuh"
#include "device/mma.cuh"
#include "device/pair_table.cuh"
#include "device/shared_memory.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "gemm/heuristics.h"
#include "host/cluster_occupancy.h"
#include "host/device_info.h"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/mma_args.h"
#include "host/stream.h"
#include "host/table_values.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kWarps = kGemmMmaWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileRows = kGemmMmaTileRows;
constexpr int kUnit = 64;
constexpr int kStepUnits = 4;
constexpr int kStages = 3;
constexpr int kRowBytes = kStepUnits * kUnit / 2;
constexpr int kStageBytes = kTileRows * kRowBytes;
constexpr int kRowsPerCopy = kWarpSize / (kRowBytes / 16);
constexpr int kCopies = kTileRows / kRowsPerCopy;  // of a lane for a step

// Shared memory: the table, whose gaps of 128 bytes hold the warps' scales (two steps of 64) and
// the sums (of a tile: 16 rows of two rows of X); the map; the rings; x.
constexpr int kGapBytes = 128;
constexpr int kScaleGaps = 4;  // of a warp
constexpr int kSumsGap = kWarps * kScaleGaps;
static_assert(256 - kSumsGap == kGemmMmaSumGaps);
constexpr int kMapAt = PairTable::kBytes;
constexpr int kRingAt = kMapAt + 1024;
constexpr int kXAt = kRingAt + kWarps * kStages * kStageBytes;
static_assert(kXAt == kGemmMmaXAt);

template <class T>
struct GemmMmaParams {
  const T* x;
  int64_t x_stride;
  const uint8_t* packed;
  BlockScales scales;
  TableValues table;
  const T* bias;
  T* y;
  int64_t y_stride;
  int m;
  int n;
  int units;  ///< of a row of W
  GemmMmaPlan plan;
};

/// A warp's position in its run of steps.
struct Position {
  int step;
  int end;
  int tile;
  int k;

  __device__ __forceinline__ void advance(int k_steps) {
    ++step;
    if (++k == k_steps) {
      k = 0;
      ++tile;
    }
  }
};

__device__ __forceinline__ int run_begin(int warp, int steps) { return warp * steps / kWarps; }

template <class T, bool kDoubleQuant>
__device__ __forceinline__ void multiply(const GemmMmaParams<T>& p) {
  extern __shared__ __align__(256) char shared[];
  allow_next_kernel();
  const auto& plan = p.plan;
  const auto gap = [&](int index) { return shared + index * PairTable::kStride + kGapBytes; };
  auto* const map = reinterpret_cast<float*>(shared + kMapAt);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  char* const ring = shared + kRingAt + warp * kStages * kStageBytes;

  const int rank = static_cast<int>(blockIdx.x) & (plan.cluster - 1);
  const int cluster = static_cast<int>(blockIdx.x) / plan.cluster;
  int tile_begin = cluster * plan.tiles_per_cluster + min(cluster, plan.clusters_with_more);
  int tiles_left = plan.tiles_per_cluster + (cluster < plan.clusters_with_more ? 1 : 0);
  const int k_steps = plan.k_steps;
  const int unit_begin = rank * k_steps * kStepUnits;
  const int unit_end = min(unit_begin + k_steps * kStepUnits, p.units);
  const int unit_shift = p.scales.block_shift - 6;

  PairTable::fill<T>(shared, p.table.values, thread, kThreads);
  if (kDoubleQuant && thread < 256) map[thread] = kDynamicMapOnDevice.values[thread];
  wait_for_previous_kernel();
  float offset = 0.0f;
  if constexpr (kDoubleQuant) offset = load_after_wait(p.scales.offset);
  // x, and zeros past its end.
  const int x_pieces = k_steps * kStepUnits * (kUnit / 8);
  const int x_existing = max(unit_end - unit_begin, 0) * (kUnit / 8);
  for (int token = 0; token < p.m; ++token) {
    const T* const source = p.x + token * p.x_stride + unit_begin * kUnit;
    const uint32_t target = shared_address(shared + kXAt) + token * plan.x_pitch;
    for (int piece = thread; piece < x_pieces; piece += kThreads) {
      const bool exists = piece < x_existing;
      copy_async_16_or_zeros(target + piece * 16, exists ? source + piece * 8 : p.x, exists);
    }
  }
  copy_async_commit();

  const int copy_row = lane / (kRowBytes / 16);
  const int copy_piece = lane % (kRowBytes / 16);
  const uint32_t row_bytes = static_cast<uint32_t>(p.units) * 32;
  Position codes{};
  const auto fetch_codes = [&](int slot) {
    if (codes.step < codes.end) {
      const uint32_t target = shared_address(ring + slot * kStageBytes);
      const int unit = unit_begin + codes.k * kStepUnits + copy_piece / 2;
      const int first_row = (tile_begin + codes.tile) * kTileRows + copy_row;
      const uint8_t* source = p.packed + static_cast<uint64_t>(first_row) * row_bytes +
                              static_cast<uint32_t>(unit * 32 + copy_piece % 2 * 16);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int row = copy_row + i * kRowsPerCopy;
        const bool exists = first_row + i * kRowsPerCopy < p.n && unit < unit_end;
        copy_async_16_or_zeros(target + row * kRowBytes + (copy_piece ^ (row % 8)) * 16,
                               exists ? source : p.packed, exists);
        source += kRowsPerCopy * row_bytes;
      }
      codes.advance(k_steps);
    }
    copy_async_commit();
  };
  // A lane has row lane / 2 of the tile, and two units from 2 (lane % 2).
  Position scales{};
  RawScale raw[2][2] = {};  // of this step and of the next one
  const auto fetch_scales = [&](RawScale(&into)[2]) {
    if (scales.step >= scales.end) return;
    const int row = min((tile_begin + scales.tile) * kTileRows + lane / 2, p.n - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int unit = min(unit_begin + scales.k * kStepUnits + lane % 2 * 2 + i, unit_end - 1);
      const uint32_t block = (static_cast<uint32_t>(row) * p.units + unit) >> unit_shift;
      if constexpr (kDoubleQuant) {
        into[i] = {load_after_wait(p.scales.absmax2 + block / kGroupSize),
                   load_after_wait(p.scales.codes + block)};
      } else {
        into[i] = {load_after_wait(p.scales.values + block), 0};
      }
    }
    scales.advance(k_steps);
  };
  int pass_tiles = 0;
  Position at{};
  const auto start_pass = [&] {
    pass_tiles = min(plan.pass_tiles, tiles_left);
    at.step = run_begin(warp, pass_tiles * k_steps);
    at.end = unit_begin < unit_end ? run_begin(warp + 1, pass_tiles * k_steps) : at.step;
    at.tile = gemm_mma_tile_of(plan, at.step);
    at.k = at.step - at.tile * k_steps;
    codes = scales = at;
    fetch_scales(raw[0]);
    fetch_scales(raw[1]);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch_codes(i);
  };
  start_pass();
  copy_async_wait<kStages - 1>();  // of x
  __syncthreads();

  const uint32_t lane_offset = static_cast<uint32_t>(lane) * 4;
  const uint32_t x_of_lane = shared_address(shared + kXAt) + g * plan.x_pitch + t * 16;
  const int matrix_row = lane % 16;
  const int gaps_per_tile = (p.m + 1) / 2;
  uint4 x[2][2] = {};  // [unit % 2][half of the unit]

  for (;;) {
    float sums[4] = {};
    int slot = 0;
    int parity = 0;
    while (at.step < at.end) {
      const int scale_gap = warp * kScaleGaps + parity * 2;
      float mine[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kDoubleQuant) {
          mine[i] = decode_scale(map[raw[0][i].code], raw[0][i].value, offset);
        } else {
          mine[i] = raw[0][i].value;
        }
        mine[i] *= p.table.scale_inverse;
        raw[0][i] = raw[1][i];
      }
      reinterpret_cast<float2*>(gap(scale_gap + lane / 16))[lane % 16] =
          make_float2(mine[0], mine[1]);
      copy_async_wait<kStages - 2>();
      __syncwarp();
      fetch_scales(raw[1]);
      fetch_codes(slot == 0 ? kStages - 1 : slot - 1);

      // [row][unit]: eight rows in a gap.
      const float4 low4 = reinterpret_cast<const float4*>(gap(scale_gap))[g];
      const float4 high4 = reinterpret_cast<const float4*>(gap(scale_gap + 1))[g];
      const float low_scale[4] = {low4.x, low4.y, low4.z, low4.w};
      const float high_scale[4] = {high4.x, high4.y, high4.z, high4.w};
      const uint32_t stage = shared_address(ring + slot * kStageBytes) + matrix_row * kRowBytes;
      const uint32_t x_of_step = x_of_lane + at.k * (kStepUnits * kUnit * 2);
#pragma unroll
      for (int unit = 0; unit < kStepUnits; ++unit) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          load_shared_if(x[unit % 2][half], x_of_step + unit * (kUnit * 2) + half * kUnit, g < p.m);
        }
        uint32_t words[4];  // rows g and g + 8 of the unit's first half, then of its second
        load_matrix_x4(stage + ((unit * 2 + lane / 16) ^ (matrix_row % 8)) * 16, words);
        float dot[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t low = words[j / 2 * 2];
          const uint32_t high = words[j / 2 * 2 + 1];
          const int byte = j % 2 * 2;
          const uint32_t a[4] = {PairTable::look_up_at(shared, lane_offset, low, byte),
                                 PairTable::look_up_at(shared, lane_offset, high, byte),
                                 PairTable::look_up_at(shared, lane_offset, low, byte + 1),
                                 PairTable::look_up_at(shared, lane_offset, high, byte + 1)};
          const uint4 v = x[unit % 2][j / 2];
          mma_m16n8k16<T>(dot, a, j % 2 == 0 ? v.x : v.z, j % 2 == 0 ? v.y : v.w, dot);
        }
        sums[0] = fmaf(dot[0], low_scale[unit], sums[0]);
        sums[1] = fmaf(dot[1], low_scale[unit], sums[1]);
        sums[2] = fmaf(dot[2], high_scale[unit], sums[2]);
        sums[3] = fmaf(dot[3], high_scale[unit], sums[3]);
      }
      slot = slot == kStages - 1 ? 0 : slot + 1;
      parity ^= 1;
      const int tile = at.tile;
      at.advance(k_steps);
      if (at.tile != tile || at.step == at.end) {
        // Warps of increasing numbers have tiles of increasing numbers: warp + tile is theirs alone.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 2 * t + i % 2;
          if (token < p.m) {
            const int index = kSumsGap + (warp + tile) * gaps_per_tile + t;
            reinterpret_cast<float*>(gap(index))[i % 2 * kTileRows + g + i / 2 * 8] = sums[i];
          }
          sums[i] = 0.0f;
        }
      }
    }
    const int done_begin = tile_begin;
    const int done_tiles = pass_tiles;
    tile_begin += pass_tiles;
    tiles_left -= pass_tiles;
    copy_async_wait<0>();
    __syncwarp();
    if (tiles_left > 0) start_pass();  // loads while the sums are made
    cluster_sync(plan.cluster);

    // A warp sums a tile for two rows of X.
    const int steps = done_tiles * k_steps;
    for (int i = warp * plan.cluster + rank; i < done_tiles * gaps_per_tile;
         i += kWarps * plan.cluster) {
      const int tile = i / gaps_per_tile;
      const int pair = i - tile * gaps_per_tile;
      float sum = 0.0f;
      for (int block = 0; block < plan.cluster; ++block) {
        if (block * k_steps * kStepUnits >= p.units) continue;
#pragma unroll 4
        for (int w = 0; w < kWarps; ++w) {
          const int first = run_begin(w, steps);
          const int last = run_begin(w + 1, steps);
          if (first < (tile + 1) * k_steps && last > tile * k_steps && first < last) {
            const int index = kSumsGap + (w + tile) * gaps_per_tile + pair;
            sum += load_cluster(shared_address(gap(index)) + lane * 4, block, plan.cluster);
          }
        }
      }
      const int token = pair * 2 + lane / kTileRows;
      const int row = (done_begin + tile) * kTileRows + lane % kTileRows;
      if (row < p.n && token < p.m) {
        if (p.bias != nullptr) sum += to_float(p.bias[row]);
        p.y[token * p.y_stride + row] = from_float<T>(sum);
      }
    }
    if (tiles_left <= 0 && plan.cluster == 1) break;
    cluster_sync(plan.cluster);  // the sums have been read, by other thread blocks too
    if (tiles_left <= 0) break;
  }
}

template <class T, bool kDoubleQuant>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_mma_kernel(const __grid_constant__ GemmMmaParams<T> p) {
  // Elsewhere is_gemm_mma_usable() says no.
  if constexpr (kIsHopperOrNewer<T>) multiply<T, kDoubleQuant>(p);
}

template <class T, bool kDoubleQuant>
void launch_gemm(int device, const GemmMmaParams<T>& params, cudaStream_t stream) {
  const auto kernel = gemm_mma_kernel<T, kDoubleQuant>;
  static OncePerDevice once;
  once(device, [&] { allow_shared_memory(kernel, kGemmMmaSharedBytes); });
  launch("matmul_4bit gemm_mma", kernel,
         {.grid = params.plan.grid,
          .block = kThreads,
          .dynamic_shared_bytes = static_cast<size_t>(params.plan.shared_bytes),
          .cluster = params.plan.cluster,
          .overlaps_previous = true},
         stream, params);
}

}  // namespace

bool is_gemm_mma_usable(Device device, std::string* why_not) {
  return is_usable(device, why_not) && has_hopper_resources(device, kGemmMmaSharedBytes, why_not);
}

bool supports_gemm_mma(const MatmulArgs& args, std::string* why_not) {
  if (args.weight.cols > kGemmMmaMaxDepth) {
    *why_not = "K is above " + std::to_string(kGemmMmaMaxDepth);
    return false;
  }
  return supports_mma(args, kGemmMmaMaxRows, why_not);
}

bool prefers_gemm_mma(const MatmulArgs& args) { return gemm_mma_is_preferred(args.x.rows); }

void gemm_mma(const MatmulArgs& args, Workspace, Stream stream) {
  const QuantizedView& weight = args.weight;
  const DeviceGuard guard(weight.device.index);
  const ClusterCounts& clusters = cluster_counts(weight.device);
  visit_16bit_dtype(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t first = 0; first < args.x.rows; first += kGemmMmaTokens) {
      const int64_t m = std::min(args.x.rows - first, int64_t{kGemmMmaTokens});
      const GemmMmaParams<T> params{
          .x = static_cast<const T*>(args.x.data) + first * args.x.row_stride,
          .x_stride = args.x.row_stride,
          .packed = weight.packed,
          .scales = block_scales(weight),
          .table = table_values(weight.codebook, args.x.dtype),
          .bias = static_cast<const T*>(args.bias.data),
          .y = static_cast<T*>(args.y.data) + first * args.y.row_stride,
          .y_stride = args.y.row_stride,
          .m = static_cast<int>(m),
          .n = static_cast<int>(weight.rows),
          .units = static_cast<int>(weight.cols / kUnit),
          .plan = plan_gemm_mma({m, weight.rows, weight.cols, clusters})};
      visit_bool(weight.absmax.is_double_quantized(), [&](auto double_quant) {
        launch_gemm<T, decltype(double_quant)::value>(weight.device.index, params, to_cuda(stream));
      });
    }
  });
}

}  // namespace qlora_native::cuda
