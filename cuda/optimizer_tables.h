// What the optimizer's kernels take: addresses of many tensors as kernel parameters, of which CUDA
// allows 32,764 bytes on every GPU that the library supports.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optimizer_math.h"
#include "qlora_native/optimizer.h"

namespace qlora_native::cuda {

inline constexpr int kMaxTensors = 400;
inline constexpr size_t kMaxParamBytes = 32764;

struct PrepareRecord {
  OptimizerGroup group;
  float* step;
  bool advances_step;
};

struct PrepareTable {
  StepScalars* scalars;  ///< one for each record
  const float* grad_scale;
  const float* found_inf;
  const float* grad_norm;
  float max_norm;
  bool skips_nonfinite;
  OptimizerAlgorithm algorithm;
  int32_t count;
  PrepareRecord records[kMaxTensors];
};
static_assert(sizeof(PrepareTable) <= kMaxParamBytes);

struct StepRecord {
  void* param;
  const void* grad;
  void* state1;
  void* state2;
  float* absmax1;
  float* absmax2;
  float* master;
  int64_t numel;
  uint32_t first_chunk;  ///< number of the tensor's first thread block
  uint32_t first_unit;   ///< where it starts in its parameter, in blocks of 256
  uint32_t random_stream;
  uint16_t scalars;  ///< index
  bool is_aligned;   ///< for vectors of four elements
};

struct StepTable {
  const StepScalars* scalars;
  uint64_t seed;
  int32_t count;
  bool stochastic_rounding;
  StepRecord records[kMaxTensors];
};
static_assert(sizeof(StepTable) <= kMaxParamBytes);

}  // namespace qlora_native::cuda
