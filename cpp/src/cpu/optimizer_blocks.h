// The loops of the optimizer kernels. A vocabulary `V` brings
//   kWidth, Floats, set1, load, store, load_as_float<DType>     as in simd_avx512.h;
//   store_as<DType>(void*, Floats)                              rounds to nearest;
//   square_root(Floats), with_sign_of(Floats, Floats)           see optimizer_math.h;
//   largest_magnitude(const float*)                             of 256: NaN or infinity if any is;
//   decode(const float* map, const uint8_t* codes, float absmax, float* out)       of 256;
//   encode(const Table&, const float* x, float reciprocal, uint8_t* codes)         of 256, finite.
// In an unnamed namespace for the reason given in element.h.
#pragma once

#include <cstring>

#include "cpu/decode.h"
#include "cpu/element.h"
#include "cpu/kernels.h"
#include "nearest_code.h"
#include "optimizer_math.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kStateBlock = kStateBlockSize;

/// One float at a time: the portable kernel, and the odd ends of the others.
struct Portable {
  static constexpr int kWidth = 1;
  using Floats = float;
  static float set1(float x) { return x; }
  static float load(const float* p) { return *p; }
  static void store(float* p, float x) { *p = x; }
  template <DType kType>
  static float load_as_float(const void* p) {
    return load_element(p, 0, kType);
  }
  template <DType kType>
  static void store_as(void* p, float x) {
    store_element(p, 0, kType, x);
  }
  static float square_root(float x) { return std::sqrt(x); }
  static float with_sign_of(float x, float y) { return y > 0 ? x : y < 0 ? -x : 0.0f; }
  static float largest_magnitude(const float* x) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < kStateBlock; ++i) {
      const uint32_t magnitude = float_bits(x[i]) & 0x7fffffffu;
      largest = largest > magnitude ? largest : magnitude;
    }
    return bits_float(largest);
  }
  static void decode(const float* map, const uint8_t* codes, float absmax, float* out) {
    for (int64_t i = 0; i < kStateBlock; ++i) out[i] = map[codes[i]] * absmax;
  }
  template <class Table>
  static void encode(const Table& table, const float* x, float reciprocal, uint8_t* codes) {
    for (int64_t i = 0; i < kStateBlock; ++i) codes[i] = nearest_code(table, x[i] * reciprocal);
  }
};

template <class V, OptimizerAlgorithm kAlgorithm>
void update_elements(const StepScalars& scalars, const float* grads, int64_t begin, int64_t end,
                     float* params, float* moments, float* squares) {
  using F = typename V::Floats;
  const StepFactors<V> s = step_factors<V>(scalars, [](float x) { return V::set1(x); });
  for (int64_t i = begin; i + V::kWidth <= end; i += V::kWidth) {
    F p = V::load(params + i);
    F m = V::load(moments + i);
    if constexpr (kAlgorithm == OptimizerAlgorithm::kAdamW) {
      F v = V::load(squares + i);
      adamw_step<V>(s, scalars.lerp_from_grad, V::load(grads + i), &p, &m, &v,
                    [](F x, F y) { return V::square_root(x) / y; });
      V::store(squares + i, v);
    } else {
      lion_step<V>(s, V::load(grads + i), &p, &m, [](F x, F y) { return V::with_sign_of(x, y); });
    }
    V::store(params + i, p);
    V::store(moments + i, m);
  }
}

template <class V>
void update(OptimizerAlgorithm algorithm, const StepScalars& scalars, const float* grads,
            int64_t count, float* params, float* moments, float* squares) {
  const int64_t whole = count / V::kWidth * V::kWidth;
  if (algorithm == OptimizerAlgorithm::kAdamW) {
    constexpr auto kAdamW = OptimizerAlgorithm::kAdamW;
    update_elements<V, kAdamW>(scalars, grads, 0, whole, params, moments, squares);
    update_elements<Portable, kAdamW>(scalars, grads, whole, count, params, moments, squares);
  } else {
    constexpr auto kLion = OptimizerAlgorithm::kLion;
    update_elements<V, kLion>(scalars, grads, 0, whole, params, moments, squares);
    update_elements<Portable, kLion>(scalars, grads, whole, count, params, moments, squares);
  }
}

/// A moment's elements of one block: floats where they lie, or decoded codes.
template <class V>
class StateBlock {
 public:
  StateBlock(void* state, float* absmax, int64_t begin, int64_t count) : count_(count) {
    if (absmax != nullptr) {
      codes_ = static_cast<uint8_t*>(state) + begin;
      absmax_ = absmax + begin / kStateBlock;
      floats_ = buffer_;
    } else if (state != nullptr) {
      floats_ = static_cast<float*>(state) + begin;
    }
  }

  float* floats() { return floats_; }

  void decode(const DynamicMap& map) {
    if (absmax_ == nullptr) return;
    if (count_ == kStateBlock) return V::decode(map.values, codes_, *absmax_, buffer_);
    // Zeros behind the last element, of which nothing is stored, do not change the maximum.
    uint8_t padded[kStateBlock] = {};
    std::memcpy(padded, codes_, static_cast<size_t>(count_));
    V::decode(map.values, padded, *absmax_, buffer_);
    for (int64_t i = count_; i < kStateBlock; ++i) buffer_[i] = 0.0f;
  }

  /// `zero_code`: of blocks without a scale.
  template <class Table>
  void encode(const Table& table, uint8_t zero_code) {
    if (absmax_ == nullptr) return;
    const float largest = V::largest_magnitude(buffer_);
    const bool has_codes = largest > 0 && is_finite(largest);
    const float absmax = largest < kSmallestStateAbsmax ? kSmallestStateAbsmax : largest;
    uint8_t codes[kStateBlock];
    if (has_codes) {
      V::encode(table, buffer_, 1.0f / absmax, codes);
      if constexpr (Table::kSigns == 1) keep_from_zero(codes);
    } else {
      std::memset(codes, zero_code, sizeof(codes));
    }
    *absmax_ = has_codes ? absmax : largest == 0 ? 0.0f : bits_float(kQuietNan);
    std::memcpy(codes_, codes, static_cast<size_t>(count_));
  }

 private:
  void keep_from_zero(uint8_t* codes) const {
    for (int64_t i = 0; i < kStateBlock; ++i) {
      codes[i] =
          static_cast<uint8_t>(codes[i] + static_cast<uint8_t>((codes[i] == 0) & (buffer_[i] > 0)));
    }
  }

  int64_t count_;
  uint8_t* codes_ = nullptr;
  float* absmax_ = nullptr;
  float* floats_ = nullptr;  ///< null for a moment that the algorithm does not have
  alignas(64) float buffer_[kStateBlock];
};

template <class V, DType kType>
void store_run(const float* values, int64_t count, void* out, int64_t begin) {
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) {
    V::template store_as<kType>(element_address(out, begin + i, kType), V::load(values + i));
  }
  for (; i < count; ++i) store_element(out, begin + i, kType, values[i]);
}

/// To a 16-bit parameter, at random if `call` says so.
template <class V>
void store_params(const StepCall& call, const StepScalars& scalars, const OptimizerTensor& tensor,
                  float* values, int64_t begin, int64_t count) {
  if (call.stochastic_rounding && tensor.master == nullptr) {
    for (int64_t i = 0; i < count; i += 4) {
      const RandomWords random = random_words(call.seed, tensor.first_element + begin + i,
                                              scalars.step, tensor.random_stream);
      for (int64_t j = i; j < count && j < i + 4; ++j) {
        values[j] = stochastically_rounded(tensor.param_dtype, values[j], random.words[j - i]);
      }
    }
  }
  if (tensor.param_dtype == DType::kFloat16) {
    store_run<V, DType::kFloat16>(values, count, tensor.param, begin);
  } else {
    store_run<V, DType::kBFloat16>(values, count, tensor.param, begin);
  }
}

/// Elements [first, last) of `tensor`; `first` is where a block starts.
template <class V>
void step_elements(const StepCall& call, const OptimizerTensor& tensor, const StepScalars& scalars,
                   int64_t first, int64_t last) {
  const bool is_float = tensor.param_dtype == DType::kFloat32;
  for (int64_t begin = first; begin < last; begin += kStateBlock) {
    const int64_t count = last - begin < kStateBlock ? last - begin : kStateBlock;
    alignas(64) float param_buffer[kStateBlock];
    alignas(64) float grad_buffer[kStateBlock];
    StateBlock<V> moments(tensor.state1, tensor.absmax1, begin, count);
    StateBlock<V> squares(tensor.state2, tensor.absmax2, begin, count);
    moments.decode(kSignedDynamicMap);
    squares.decode(kUnsignedDynamicMap);

    float* params = param_buffer;
    if (is_float) {
      params = static_cast<float*>(tensor.param) + begin;
    } else if (tensor.master != nullptr) {
      params = tensor.master + begin;
    } else {
      load_run<V>(tensor.param, begin, count, tensor.param_dtype, params);
    }
    const float* grads = grad_buffer;
    if (tensor.grad_dtype == DType::kFloat32) {
      grads = static_cast<const float*>(tensor.grad) + begin;
    } else {
      load_run<V>(tensor.grad, begin, count, tensor.grad_dtype, grad_buffer);
    }

    update<V>(call.algorithm, scalars, grads, count, params, moments.floats(), squares.floats());

    if (!is_float) store_params<V>(call, scalars, tensor, params, begin, count);
    moments.encode(kSignedCodeTable, kSignedDynamicZeroCode);
    squares.encode(kUnsignedCodeTable, 0);
  }
}

}  // namespace
}  // namespace qlora_native::cpu
