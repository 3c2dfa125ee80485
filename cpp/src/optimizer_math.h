// The arithmetic of the optimizers, once for all backends and vector widths. Nothing here may be
// contracted to an FMA: the sources that include it are compiled so.
#pragma once

#include <cstdint>

#include "philox.h"
#include "qlora_native/dtype.h"
#include "qlora_native/optimizer.h"

namespace qlora_native {

/// What a step does to one tensor, from its group, its step count and the gradients' norm.
struct StepScalars {
  float grad_factor;  ///< minus when maximizing, over the scale, times the clipping
  float decay;        ///< 1 - lr * weight_decay
  float beta1;        ///< Lion
  float weight1;      ///< of the new gradient in m, or minus that of the old m, see lerp
  float beta2;
  float weight2;     ///< 1 - beta2
  float step_size;   ///< lr, over the first bias correction for AdamW
  float bias2_sqrt;  ///< the square root of AdamW's second bias correction
  float eps;
  float step;           ///< t
  bool lerp_from_grad;  ///< beta1 <= 1/2: from the end that the result is nearer to, as torch does
  bool skips;           ///< the step does nothing
};

/// What a step reads of the device besides a tensor's arrays; the defaults stand for null pointers.
struct StepConditions {
  float grad_scale = 1.0f;
  float found_inf = 0.0f;
  float grad_norm = 0.0f;
};

constexpr bool is_finite_float(float x) {
  return (__builtin_bit_cast(uint32_t, x) & 0x7f800000u) != 0x7f800000u;
}

/// base^exponent by squaring, the same on every machine.
constexpr double integer_power(double base, uint32_t exponent) {
  double power = 1.0;
  for (; exponent != 0; exponent >>= 1) {
    if ((exponent & 1) != 0) power *= base;
    base *= base;
  }
  return power;
}

/// The factor of the gradients: 1 / scale times torch's clip_grad_norm_ of what that gives.
constexpr float gradient_factor(const StepConditions& conditions, float max_norm) {
  const auto inverse_scale = static_cast<float>(1.0 / static_cast<double>(conditions.grad_scale));
  if (!(max_norm > 0)) return inverse_scale;
  const float clip = max_norm / (conditions.grad_norm * inverse_scale + 1e-6f);
  return inverse_scale * (clip > 1.0f ? 1.0f : clip);  // a NaN stays one
}

/// `previous_step`: t - 1. `lr`: that of the group, or of the device. `square_root` of a double.
template <class SquareRoot>
constexpr StepScalars step_scalars(OptimizerAlgorithm algorithm, const OptimizerGroup& group,
                                   double lr, float previous_step, float max_norm,
                                   bool skips_nonfinite, const StepConditions& conditions,
                                   const SquareRoot& square_root) {
  StepScalars s{};
  s.skips =
      conditions.found_inf != 0.0f || (skips_nonfinite && !is_finite_float(conditions.grad_norm));
  const float factor = gradient_factor(conditions, max_norm);
  s.grad_factor = group.maximize ? -factor : factor;
  s.step = previous_step + 1.0f;
  s.decay = static_cast<float>(1.0 - lr * group.weight_decay);
  s.beta1 = static_cast<float>(group.beta1);
  s.beta2 = static_cast<float>(group.beta2);
  s.weight1 = static_cast<float>(1.0 - group.beta1);
  s.weight2 = static_cast<float>(1.0 - group.beta2);
  s.step_size = static_cast<float>(lr);
  if (algorithm == OptimizerAlgorithm::kAdamW) {
    const auto t = static_cast<uint32_t>(s.step);
    const double bias1 = 1.0 - integer_power(group.beta1, t);
    const double bias2 = 1.0 - integer_power(group.beta2, t);
    s.step_size = static_cast<float>(lr / bias1);
    s.bias2_sqrt = static_cast<float>(square_root(bias2));
    s.eps = static_cast<float>(group.eps);
    s.lerp_from_grad = !(s.weight1 < 0.5f);
    if (s.lerp_from_grad) s.weight1 -= 1.0f;
  }
  return s;
}

/// The scalars as vectors of a vocabulary `V`, whose `Floats` may be float.
template <class V>
struct StepFactors {
  typename V::Floats grad_factor, decay, beta1, weight1, beta2, weight2, step_size, bias2_sqrt, eps;
};

/// `broadcast`: a float to a V::Floats.
template <class V, class Broadcast>
constexpr StepFactors<V> step_factors(const StepScalars& s, const Broadcast& broadcast) {
  return {broadcast(s.grad_factor), broadcast(s.decay),      broadcast(s.beta1),
          broadcast(s.weight1),     broadcast(s.beta2),      broadcast(s.weight2),
          broadcast(s.step_size),   broadcast(s.bias2_sqrt), broadcast(s.eps)};
}

/// One step of AdamW. `root_over(x, y)` is sqrt(x) / y, both of them rounded.
template <class V, class RootOver>
constexpr void adamw_step(const StepFactors<V>& s, bool lerp_from_grad, typename V::Floats raw_grad,
                          typename V::Floats* p, typename V::Floats* m, typename V::Floats* v,
                          const RootOver& root_over) {
  const auto grad = raw_grad * s.grad_factor;
  const auto moment = (lerp_from_grad ? grad : *m) + s.weight1 * (grad - *m);
  const auto square = *v * s.beta2 + s.weight2 * grad * grad;
  const auto denominator = root_over(square, s.bias2_sqrt) + s.eps;
  *p = *p * s.decay - s.step_size * moment / denominator;
  *m = moment;
  *v = square;
}

/// One step of Lion. `with_sign_of(x, y)`: x with y's sign, or 0 where y is 0 or a NaN.
template <class V, class WithSignOf>
constexpr void lion_step(const StepFactors<V>& s, typename V::Floats raw_grad,
                         typename V::Floats* p, typename V::Floats* m,
                         const WithSignOf& with_sign_of) {
  const auto grad = raw_grad * s.grad_factor;
  const auto update = *m * s.beta1 + s.weight1 * grad;
  *p = *p * s.decay - with_sign_of(s.step_size, update);
  *m = *m * s.beta2 + s.weight2 * grad;
}

/// The smallest absmax of a block that is not all zeros: its reciprocal is finite.
inline constexpr float kSmallestStateAbsmax = 0x1p-126f;

// ---- Stochastic rounding ----

/// The random words of elements [element, element + 4), `element` a multiple of 4 counted from the
/// start of the parameter.
constexpr RandomWords random_words(uint64_t seed, int64_t element, float step, uint32_t stream) {
  return philox(seed, static_cast<uint64_t>(element) / 4, static_cast<uint32_t>(step), stream);
}

/// x rounded to one of its two neighbours of a 16-bit type, which is exact there. What the type
/// holds stays as it is; what is beyond its range, or not finite, is left to ordinary rounding.
constexpr float stochastically_rounded(DType dtype, float x, uint32_t random) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits ^ sign;
  if (dtype == DType::kBFloat16) {
    if (magnitude >= 0x7f7f0000u) return x;  // its largest finite number and more
    return __builtin_bit_cast(float, (bits + (random & 0xffffu)) & 0xffff0000u);
  }
  if (magnitude >= 0x477fe000u) return x;  // 65504, float16's largest, and more
  // Scaled so that the spacing of float16 here, 2^(exponent - 10) and at least 2^-24, becomes 1.
  const uint32_t exponent = magnitude >> 23 > 113 ? magnitude >> 23 : 113;
  const float spacing = __builtin_bit_cast(float, (exponent - 10) << 23);
  const float per_spacing = __builtin_bit_cast(float, (264 - exponent) << 23);
  const float scaled = __builtin_bit_cast(float, magnitude) * per_spacing;
  // Thirteen random bits, as many as the fraction has at most: the sum is exact or cut below 1.
  const float raised = scaled + static_cast<float>(random >> 19) * 0x1p-13f;
  const float rounded = static_cast<float>(static_cast<int32_t>(raised)) * spacing;
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, rounded));
}

}  // namespace qlora_native
