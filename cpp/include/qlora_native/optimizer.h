// Optimizer steps over many tensors at once, and the norm of their gradients.
//
// A call takes every parameter of a model, of any dtypes and sizes, and costs a handful of launches.
// What changes from step to step on a GPU (the step count, the learning rate, the gradients' scale,
// whether they are finite) is read from device memory, so that no call waits for the device and a
// captured graph can be replayed. Everything is computed in fp32, each operation rounded, with the
// same bits on every backend (but for the clipping: a norm's last bits depend on the backend).
#pragma once

#include <cstdint>
#include <span>

#include "qlora_native/device.h"
#include "qlora_native/dtype.h"
#include "qlora_native/export.h"
#include "qlora_native/stream.h"
#include "qlora_native/views.h"

namespace qlora_native {

/// Elements of an 8-bit state that share an absmax.
inline constexpr int64_t kStateBlockSize = 256;

enum class OptimizerAlgorithm : int32_t {
  /// Adam with decoupled weight decay (Loshchilov and Hutter, 2019), in torch's order of operations:
  ///   p *= 1 - lr * weight_decay
  ///   m += (1 - beta1) * (g - m)      v = beta2 * v + (1 - beta2) * g * g
  ///   p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
  kAdamW = 0,
  /// Lion (Chen et al., 2023), whose one state is m:
  ///   p *= 1 - lr * weight_decay
  ///   p -= lr * sign(beta1 * m + (1 - beta1) * g)      m = beta2 * m + (1 - beta2) * g
  kLion = 1,
};

constexpr const char* name(OptimizerAlgorithm algorithm) {
  return algorithm == OptimizerAlgorithm::kAdamW ? "adamw" : "lion";
}

/// How the moments of a parameter are kept.
enum class StateFormat : int32_t {
  kFloat32 = 0,
  /// A byte per element and an fp32 absmax per kStateBlockSize consecutive elements, the last block
  /// of which may be short: map.values[code] * absmax, over kSignedDynamicMap for m and
  /// kUnsignedDynamicMap for v. A new code is the nearest to x * (1 / absmax). What keeps v apart
  /// from zero, without which m / (sqrt(v) + eps) explodes: a v that is not 0 never gets code 0. An
  /// absmax below 2^-126 is kept as 2^-126; a block that holds a NaN or an infinity becomes NaN.
  kDynamic8bit = 1,
};

/// One parameter, or a run of consecutive elements of one, and what belongs to it. Arrays are
/// contiguous, on the call's device, and do not overlap.
struct OptimizerTensor {
  void* param = nullptr;       ///< [numel] of param_dtype
  const void* grad = nullptr;  ///< [numel] of grad_dtype
  void* state1 = nullptr;      ///< [numel] m: floats or codes
  void* state2 = nullptr;      ///< [numel] v; null for Lion
  float* absmax1 = nullptr;    ///< [num_blocks(numel, kStateBlockSize)]; null for fp32 states
  float* absmax2 = nullptr;    ///< the same for v
  /// Null, or [numel] the parameter in fp32, for a 16-bit one: this is updated, and rounded to
  /// `param`.
  float* master = nullptr;
  float* step = nullptr;  ///< [1] how many steps were taken: t - 1 when the call starts
  int64_t numel = 0;
  int32_t group = 0;  ///< index of its hyperparameters
  DType param_dtype = DType::kFloat32;
  DType grad_dtype = DType::kFloat32;  ///< param_dtype or kFloat32
  StateFormat state_format = StateFormat::kFloat32;
  /// False for all but the last of several runs of one parameter, which share `step`.
  bool advances_step = true;
  /// Where the run starts in its parameter, a multiple of kStateBlockSize, and the parameter's
  /// number: they tell the random bits of one element from another's.
  int64_t first_element = 0;
  uint32_t random_stream = 0;
};

struct OptimizerGroup {
  double lr = 1e-3;
  const float* lr_on_device = nullptr;  ///< null, or one float on the call's device instead of `lr`
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;  ///< not used by Lion
  double weight_decay = 1e-2;
  bool maximize = false;
};

struct OptimizerStepArgs {
  OptimizerAlgorithm algorithm = OptimizerAlgorithm::kAdamW;
  std::span<const OptimizerTensor> tensors;  ///< in host memory, as are the groups
  std::span<const OptimizerGroup> groups;
  Device device;
  // The pointers are null, or to one float on the device.
  const float* grad_scale = nullptr;  ///< gradients are divided by it
  const float* found_inf = nullptr;   ///< when it is not 0, nothing is changed
  const float* grad_norm = nullptr;   ///< of all gradients as they are (see gradient_norm)
  /// Above 0, gradients are multiplied by min(1, max_norm / (norm + 1e-6)), norm being
  /// grad_norm / grad_scale.
  double max_norm = 0;
  bool skip_nonfinite = false;  ///< when grad_norm is not finite, nothing is changed
  /// 16-bit parameters without a master are rounded up or down at random, with probabilities that
  /// make the result right on average: the random number of an element is Philox-4x32-10 of
  /// (element, step, random_stream) under the key `seed`. Else to the nearest.
  bool stochastic_rounding = false;
  uint64_t seed = 0;
};

/// Scratch bytes `optimizer_step` needs. Throws as it does.
QN_API int64_t optimizer_step_workspace_bytes(const OptimizerStepArgs& args);

/// One step: updates parameters, states and step counts. Launches: two for up to 400 tensors that
/// agree in dtypes, state format and the like. Does not wait for `stream`; can be captured in a CUDA
/// graph, which then holds the addresses and what is passed by value. Tensors without elements only
/// have their step counted. Throws InvalidArgument (before anything is touched), Unsupported,
/// CudaError.
QN_API void optimizer_step(const OptimizerStepArgs& args, Workspace workspace, Stream stream);

struct GradientNormArgs {
  std::span<const VectorView> grads;  ///< in host memory; all on one device
  float* norm = nullptr;              ///< one float there: the square root of the sum of squares
  Device device;
};

/// Scratch bytes `gradient_norm` needs. Throws as it does.
QN_API int64_t gradient_norm_workspace_bytes(const GradientNormArgs& args);

/// The L2 norm of all elements of all arrays, as one vector. Squares in fp32 are summed in fp64 in an
/// order that depends on nothing but the sizes, so the same gradients give the same bits on one
/// backend. A NaN or an infinity, or a square beyond fp32, makes it not finite. Does not wait for
/// `stream`; can be captured in a CUDA graph. Throws as `optimizer_step` does.
QN_API void gradient_norm(const GradientNormArgs& args, Workspace workspace, Stream stream);

}  // namespace qlora_native
