// The L2 norm of many arrays.
//
// `sum_kernel`: a thread block squares and sums 8192 consecutive elements of one array: a thread the
// squares of its 32 in fp64, in order; then a tree over the lanes, and one over the warps.
// `root_kernel`: one thread block sums the partial sums, thread j those numbered j, j + 1024, ...,
// then a tree, and takes the root. The order depends on the sizes alone.
//
// The arrays' addresses are the kernel's parameters, a table of up to 1024 of one dtype.
//
// Bytes moved per element: its own. Bound: memory.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "device/chunk_search.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"

namespace qlora_native::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  ///< of eight elements, for each thread
constexpr int64_t kChunk = int64_t{kThreads} * kVectors * 8;
constexpr int kRootThreads = 1024;
constexpr int kMaxArrays = 1024;

struct GradRecord {
  const void* data;
  int64_t size;
  uint32_t first_chunk;  ///< number of the array's first thread block
  bool is_aligned;       ///< to 16 bytes
};

struct GradTable {
  double* sums;  ///< one for each thread block
  int32_t count;
  GradRecord records[kMaxArrays];
};
static_assert(sizeof(GradTable) <= 32764, "more than a kernel's parameters can be");

/// The sum over the thread block, in thread 0.
template <int kBlockThreads>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double sums[kBlockThreads / kWarpSize];
  value = warp_tree_sum(value);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  if (warp != 0) return 0.0;
  return warp_tree_sum(lane < kBlockThreads / kWarpSize ? sums[lane] : 0.0);
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ GradTable table) {
  const GradRecord& record = record_of_chunk(table, blockIdx.x);
  const T* const data = static_cast<const T*>(record.data);
  const int64_t first =
      int64_t{blockIdx.x - record.first_chunk} * kChunk + static_cast<int64_t>(threadIdx.x) * 8;
  float values[kVectors][8];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t begin = first + int64_t{v} * kThreads * 8;
    if (record.is_aligned && begin + 8 <= record.size) {
      load8<true>(data + begin, values[v]);
    } else {
      load8_partial(data + begin, record.size - begin, values[v]);
    }
  }
  double sum = 0.0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += static_cast<double>(__fmul_rn(values[v][i], values[v][i]));
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) table.sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kRootThreads)
    root_kernel(const double* sums, int64_t count, float* norm) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kRootThreads) sum += sums[i];
  sum = block_sum<kRootThreads>(sum);
  if (threadIdx.x == 0) *norm = __double2float_rn(__dsqrt_rn(sum));
}

int64_t chunks_of(const VectorView& grad) { return ceil_div(grad.size, kChunk); }

/// Queues the sums of the arrays of one dtype; returns where the next ones go.
template <class T>
double* sum_arrays(const GradientNormArgs& args, DType dtype, double* sums, cudaStream_t stream) {
  GradTable table;
  table.count = 0;
  int64_t chunks = 0;
  const auto flush = [&] {
    if (table.count == 0) return;
    table.sums = sums;
    launch("gradient_norm sum", sum_kernel<T>, {.grid = chunks, .block = kThreads}, stream, table);
    sums += chunks;
    table.count = 0;
    chunks = 0;
  };
  for (const VectorView& grad : args.grads) {
    if (grad.dtype != dtype || grad.size == 0) continue;
    if (table.count == kMaxArrays ||
        chunks + chunks_of(grad) > std::numeric_limits<int32_t>::max()) {
      flush();
    }
    table.records[table.count++] = {grad.data, grad.size, static_cast<uint32_t>(chunks),
                                    is_aligned(grad.data, 16)};
    chunks += chunks_of(grad);
  }
  flush();
  return sums;
}

}  // namespace

int64_t gradient_norm_simt_workspace_bytes(const GradientNormArgs& args) {
  int64_t chunks = 0;
  for (const VectorView& grad : args.grads) chunks += chunks_of(grad);
  return chunks * static_cast<int64_t>(sizeof(double));
}

void gradient_norm_simt(const GradientNormArgs& args, Workspace workspace, Stream stream) {
  const DeviceGuard guard(args.device.index);
  auto* const first = static_cast<double*>(workspace.data);
  double* sums = first;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    visit_dtype(dtype, [&](auto tag) {
      sums = sum_arrays<typename decltype(tag)::type>(args, dtype, sums, to_cuda(stream));
    });
  }
  launch("gradient_norm root", root_kernel, {.grid = 1, .block = kRootThreads}, to_cuda(stream),
         first, static_cast<int64_t>(sums - first), args.norm);
}

}  // namespace qlora_native::cuda
