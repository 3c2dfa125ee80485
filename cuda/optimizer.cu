// One optimizer step of many tensors.
//
// Two kinds of kernels. `prepare_kernel`, one thread block, turns each tensor's step count and
// hyperparameters, and the gradients' scale and norm, all of which may lie in device memory, into the
// scalars of the update, and counts the step. `step_kernel` updates the elements of all tensors that
// agree in their dtypes and state format.
//
// The tensors' addresses are the kernels' parameters, a table of up to 400: nothing is uploaded, kept
// from step to step, or waited for, and a graph captures the table. A thread block finds its tensor
// by bisection of the table, in the constant cache.
//
// A warp updates 256 consecutive elements, a block of an 8-bit state: lane l has elements 4 l .. 4 l
// + 3 and 128 + 4 l .. + 3, so that every access of the warp is contiguous (fp32: 16 bytes a lane,
// 16-bit: 8, codes: 4). Arrays that are not aligned for that, and a tensor's end, take single
// elements. A thread block has 8 warps, and of 8-bit tensors four times as many blocks of 256: the
// tables of the dynamic maps that it copies to shared memory are for 8192 elements then.
//
// Bytes moved per element with fp32 parameters and gradients: 28 (p, g, m, v read; p, m, v written);
// with 8-bit states 16.06. Bound: memory. An element has 220 instruction slots on an H200 (8-bit:
// 126) and takes about a third; 8-bit, six reads at random of shared memory.
//
// Compiled without contraction to FMA: the results are the CPU's, bit for bit.
#include <algorithm>
#include <cstdint>

#include "device/chunk_search.cuh"
#include "device/lane_span.cuh"
#include "device/vec_load.cuh"
#include "device/warp_reduce.cuh"
#include "host/kernel_args.h"
#include "host/launch.h"
#include "host/stream.h"
#include "operations.h"
#include "optimizer_math.h"
#include "optimizer_moment.cuh"
#include "optimizer_tables.h"

namespace qlora_native::cuda {
namespace {

constexpr int kThreads = kMapThreads;
constexpr int kWarps = kThreads / kWarpSize;

// ---- Prepare ----

constexpr int kPrepareThreads = 416;
static_assert(kPrepareThreads >= kMaxTensors && kPrepareThreads % kWarpSize == 0);

__device__ __forceinline__ float value_or(const float* pointer, float fallback) {
  return pointer == nullptr ? fallback : *pointer;
}

/// A thread per tensor. One thread block, because several runs of one parameter share a step count:
/// all read it before it is written.
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ PrepareTable table) {
  const auto i = static_cast<int>(threadIdx.x);
  const bool has_tensor = i < table.count;
  StepScalars scalars{};
  if (has_tensor) {
    const PrepareRecord& record = table.records[i];
    const StepConditions conditions{.grad_scale = value_or(table.grad_scale, 1.0f),
                                    .found_inf = value_or(table.found_inf, 0.0f),
                                    .grad_norm = value_or(table.grad_norm, 0.0f)};
    const double lr = record.group.lr_on_device == nullptr
                          ? record.group.lr
                          : static_cast<double>(*record.group.lr_on_device);
    scalars = step_scalars(table.algorithm, record.group, lr, *record.step, table.max_norm,
                           table.skips_nonfinite, conditions, [](double x) { return sqrt(x); });
    table.scalars[i] = scalars;
  }
  __syncthreads();
  if (has_tensor && table.records[i].advances_step && !scalars.skips) {
    *table.records[i].step = scalars.step;
  }
}

// ---- Step ----

template <StateFormat kFormat>
constexpr int kUnitsPerWarp = kFormat == StateFormat::kFloat32 ? 1 : 4;
template <StateFormat kFormat>
constexpr int64_t kChunk = int64_t{kUnitsPerWarp<kFormat>} * kWarps * kStateBlockSize;

/// The vocabulary of optimizer_math.h: one float.
struct Scalar {
  using Floats = float;
};

/// To the parameter's dtype, at random if the table says so.
template <class P, bool kIsWhole>
__device__ __forceinline__ void round_params(const StepTable& table, const StepRecord& record,
                                             const LaneSpan<kIsWhole>& span, float step,
                                             float (&values)[kLaneElems], P (&out)[kLaneElems]) {
  if constexpr (sizeof(P) == 2) {
    if (table.stochastic_rounding && record.master == nullptr) {
      constexpr DType kType = std::is_same_v<P, __half> ? DType::kFloat16 : DType::kBFloat16;
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        const int64_t element =
            int64_t{record.first_unit} * kStateBlockSize + span.element(4 * run);
        const RandomWords random = random_words(table.seed, element, step, record.random_stream);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          values[4 * run + i] = stochastically_rounded(kType, values[4 * run + i], random.words[i]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneElems; ++i) out[i] = from_float<P>(values[i]);
}

/// sqrt(x) / y. A rounded reciprocal of y, one remainder and two FMAs give the rounded quotient
/// (Markstein; tried with every fraction of x, for 67 y) in a third of a division's instructions.
__device__ __forceinline__ float root_over(float x, float y) {
  const float root = __fsqrt_rn(x);
  const float reciprocal = __frcp_rn(y);  // of the whole tensor: once a thread
  const float estimate = root * reciprocal;
  const float quotient = __fmaf_rn(__fmaf_rn(-estimate, y, root), reciprocal, estimate);
  return root < __uint_as_float(kInfinityBits) ? quotient : root;  // no remainder of an infinity
}

template <OptimizerAlgorithm kAlgorithm>
__device__ __forceinline__ void update(const StepFactors<Scalar>& s, bool lerp_from_grad,
                                       const float (&grads)[kLaneElems],
                                       float (&params)[kLaneElems], float (&moments)[kLaneElems],
                                       float (&squares)[kLaneElems]) {
#pragma unroll
  for (int i = 0; i < kLaneElems; ++i) {
    if constexpr (kAlgorithm == OptimizerAlgorithm::kAdamW) {
      adamw_step<Scalar>(s, lerp_from_grad, grads[i], &params[i], &moments[i], &squares[i],
                         root_over);
    } else {
      lion_step<Scalar>(s, grads[i], &params[i], &moments[i], [](float x, float y) {
        return y > 0 ? x : y < 0 ? -x : 0.0f;
      });
    }
  }
}

/// A lane's elements of one block of 256; the warp's lanes call it together.
template <OptimizerAlgorithm kAlgorithm, StateFormat kFormat, class P, class G, bool kIsWhole>
__device__ __forceinline__ void step_lane(const StepTable& table, const StepRecord& record,
                                          const StepScalars& scalars,
                                          const LaneSpan<kIsWhole>& span,
                                          const MapTables<SignedCodeTable>* moment_map,
                                          const MapTables<UnsignedCodeTable>* square_map) {
  constexpr bool kHasSquares = kAlgorithm == OptimizerAlgorithm::kAdamW;
  P raw_params[kLaneElems];
  float params[kLaneElems];
  G raw_grads[kLaneElems];
  Moment<kFormat, SignedCodeTable> moment;
  Moment<kFormat, UnsignedCodeTable> square;
  const bool has_master = sizeof(P) == 2 && record.master != nullptr;
  if (has_master) {
    load_lane(static_cast<const float*>(record.master), span, params);
  } else {
    load_lane(static_cast<const P*>(record.param), span, raw_params);
  }
  load_lane(static_cast<const G*>(record.grad), span, raw_grads);
  moment.load(record.state1, record.absmax1, span, kSignedDynamicZeroCode);
  if constexpr (kHasSquares) square.load(record.state2, record.absmax2, span, 0);

  // Asked here, so that the elements are not loaded after the scalars but beside them.
  if (scalars.skips) return;
  float grads[kLaneElems];
  to_floats(raw_grads, grads);
  if (!has_master) to_floats(raw_params, params);
  moment.decode(moment_map);
  if constexpr (kHasSquares) square.decode(square_map);

  const StepFactors<Scalar> factors = step_factors<Scalar>(scalars, [](float x) { return x; });
  update<kAlgorithm>(factors, scalars.lerp_from_grad, grads, params, moment.values, square.values);

  if (has_master) store_lane(record.master, span, params);
  round_params(table, record, span, scalars.step, params, raw_params);
  store_lane(static_cast<P*>(record.param), span, raw_params);
  moment.store(record.state1, record.absmax1, span, moment_map, kSignedDynamicZeroCode);
  if constexpr (kHasSquares) square.store(record.state2, record.absmax2, span, square_map, 0);
}

/// Codes, and the random numbers of 16-bit parameters, need more registers than four blocks leave.
template <StateFormat kFormat, class P>
constexpr int kBlocksPerSm = kFormat == StateFormat::kDynamic8bit && sizeof(P) == 2 ? 3 : 4;

template <OptimizerAlgorithm kAlgorithm, StateFormat kFormat, class P, class G>
__global__ void __launch_bounds__(kThreads, (kBlocksPerSm<kFormat, P>))
    step_kernel(const __grid_constant__ StepTable table) {
  constexpr bool kHasSquares = kAlgorithm == OptimizerAlgorithm::kAdamW;
  constexpr bool kIs8bit = kFormat == StateFormat::kDynamic8bit;
  __shared__ alignas(
      16) unsigned char moment_memory[kIs8bit ? sizeof(MapTables<SignedCodeTable>) : 16];
  __shared__ alignas(16) unsigned char
      square_memory[kIs8bit && kHasSquares ? sizeof(MapTables<UnsignedCodeTable>) : 16];
  auto* const moment_map = reinterpret_cast<MapTables<SignedCodeTable>*>(moment_memory);
  auto* const square_map = reinterpret_cast<MapTables<UnsignedCodeTable>*>(square_memory);

  const StepRecord& record = record_of_chunk(table, blockIdx.x);
  const StepScalars scalars = table.scalars[record.scalars];
  if constexpr (kIs8bit) {
    fill(*moment_map, kSignedCodesOnDevice, kSignedMapOnDevice);
    if constexpr (kHasSquares) fill(*square_map, kUnsignedCodesOnDevice, kUnsignedMapOnDevice);
    __syncthreads();
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t chunk_begin = int64_t{blockIdx.x - record.first_chunk} * kChunk<kFormat>;

#pragma unroll 1
  for (int unit = 0; unit < kUnitsPerWarp<kFormat>; ++unit) {
    const int64_t begin = chunk_begin + (int64_t{unit} * kWarps + warp) * kStateBlockSize;
    if (begin >= record.numel) return;
    // One branch for all accesses: the loads are then issued before anything waits for one.
    if (record.is_aligned && begin + kStateBlockSize <= record.numel) {
      const LaneSpan<true> span{begin + 4 * lane, record.numel};
      step_lane<kAlgorithm, kFormat, P, G>(table, record, scalars, span, moment_map, square_map);
    } else {
      const LaneSpan<false> span{begin + 4 * lane, record.numel};
      step_lane<kAlgorithm, kFormat, P, G>(table, record, scalars, span, moment_map, square_map);
    }
  }
}

// ---- Host ----

void prepare(const OptimizerStepArgs& args, StepScalars* scalars, cudaStream_t stream) {
  PrepareTable table;
  table.grad_scale = args.grad_scale;
  table.found_inf = args.found_inf;
  table.grad_norm = args.grad_norm;
  table.max_norm = static_cast<float>(args.max_norm);
  table.skips_nonfinite = args.skip_nonfinite;
  table.algorithm = args.algorithm;
  for (size_t first = 0; first < args.tensors.size(); first += kMaxTensors) {
    const size_t count = std::min<size_t>(args.tensors.size() - first, kMaxTensors);
    table.scalars = scalars + first;
    table.count = static_cast<int32_t>(count);
    for (size_t i = 0; i < count; ++i) {
      const OptimizerTensor& tensor = args.tensors[first + i];
      table.records[i] = {args.groups[static_cast<size_t>(tensor.group)], tensor.step,
                          tensor.advances_step};
    }
    launch("optimizer_step prepare", prepare_kernel, {.grid = 1, .block = kPrepareThreads}, stream,
           table);
  }
}

/// For vectors of four elements.
bool is_aligned_for_vectors(const OptimizerTensor& tensor) {
  const auto floats = 4 * sizeof(float);
  const auto state_bytes = tensor.state_format == StateFormat::kFloat32 ? floats : 4;
  return is_aligned(tensor.param, static_cast<size_t>(4 * size_bytes(tensor.param_dtype))) &&
         is_aligned(tensor.grad, static_cast<size_t>(4 * size_bytes(tensor.grad_dtype))) &&
         is_aligned(tensor.state1, state_bytes) && is_aligned(tensor.state2, state_bytes) &&
         is_aligned(tensor.master, floats);
}

StepRecord make_record(const OptimizerTensor& tensor, int64_t first_chunk, size_t scalars) {
  return {.param = tensor.param,
          .grad = tensor.grad,
          .state1 = tensor.state1,
          .state2 = tensor.state2,
          .absmax1 = tensor.absmax1,
          .absmax2 = tensor.absmax2,
          .master = tensor.master,
          .numel = tensor.numel,
          .first_chunk = static_cast<uint32_t>(first_chunk),
          .first_unit = static_cast<uint32_t>(tensor.first_element / kStateBlockSize),
          .random_stream = tensor.random_stream,
          .scalars = static_cast<uint16_t>(scalars),
          .is_aligned = is_aligned_for_vectors(tensor)};
}

/// Queues the step of the tensors that have these types.
template <OptimizerAlgorithm kAlgorithm, StateFormat kFormat, class P, class G>
void step_tensors(const OptimizerStepArgs& args, DType param_dtype, DType grad_dtype,
                  const StepScalars* scalars, cudaStream_t stream) {
  StepTable table;
  table.seed = args.seed;
  table.stochastic_rounding = args.stochastic_rounding;
  table.count = 0;
  int64_t chunks = 0;
  size_t first_scalars = 0;
  const auto flush = [&] {
    if (table.count == 0) return;
    table.scalars = scalars + first_scalars;
    launch("optimizer_step simt", step_kernel<kAlgorithm, kFormat, P, G>,
           {.grid = chunks, .block = kThreads}, stream, table);
    table.count = 0;
    chunks = 0;
  };
  for (size_t i = 0; i < args.tensors.size(); ++i) {
    const OptimizerTensor& tensor = args.tensors[i];
    if (tensor.numel == 0 || tensor.state_format != kFormat || tensor.param_dtype != param_dtype ||
        tensor.grad_dtype != grad_dtype) {
      continue;
    }
    const int64_t more = ceil_div(tensor.numel, kChunk<kFormat>);
    if (table.count == kMaxTensors || chunks + more > std::numeric_limits<int32_t>::max() ||
        i - first_scalars > std::numeric_limits<uint16_t>::max()) {
      flush();
    }
    if (table.count == 0) first_scalars = i;
    table.records[table.count++] = make_record(tensor, chunks, i - first_scalars);
    chunks += more;
  }
  flush();
}

template <OptimizerAlgorithm kAlgorithm, StateFormat kFormat>
void step_format(const OptimizerStepArgs& args, const StepScalars* scalars, cudaStream_t stream) {
  constexpr DType kFloat = DType::kFloat32;
  step_tensors<kAlgorithm, kFormat, float, float>(args, kFloat, kFloat, scalars, stream);
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    visit_16bit_dtype(dtype, [&](auto tag) {
      using P = typename decltype(tag)::type;
      step_tensors<kAlgorithm, kFormat, P, P>(args, dtype, dtype, scalars, stream);
      step_tensors<kAlgorithm, kFormat, P, float>(args, dtype, kFloat, scalars, stream);
    });
  }
}

template <OptimizerAlgorithm kAlgorithm>
void step_algorithm(const OptimizerStepArgs& args, const StepScalars* scalars,
                    cudaStream_t stream) {
  step_format<kAlgorithm, StateFormat::kFloat32>(args, scalars, stream);
  step_format<kAlgorithm, StateFormat::kDynamic8bit>(args, scalars, stream);
}

}  // namespace

int64_t optimizer_step_simt_workspace_bytes(const OptimizerStepArgs& args) {
  return static_cast<int64_t>(args.tensors.size() * sizeof(StepScalars));
}

void optimizer_step_simt(const OptimizerStepArgs& args, Workspace workspace, Stream stream) {
  const DeviceGuard guard(args.device.index);
  auto* const scalars = static_cast<StepScalars*>(workspace.data);
  prepare(args, scalars, to_cuda(stream));
  if (args.algorithm == OptimizerAlgorithm::kAdamW) {
    step_algorithm<OptimizerAlgorithm::kAdamW>(args, scalars, to_cuda(stream));
  } else {
    step_algorithm<OptimizerAlgorithm::kLion>(args, scalars, to_cuda(stream));
  }
}

}  // namespace qlora_native::cuda
