// Parameters with all that an optimizer's step touches, on the device under test.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "qlora_native/qlora_native.h"
#include "support/device_array.h"
#include "support/number_formats.h"

namespace qlora_native::testing {

using Bytes = std::vector<uint8_t>;

/// A parameter with everything that a step may touch, on a device.
class Parameter {
 public:
  struct Spec {
    int64_t numel;
    DType param_dtype = DType::kFloat32;
    DType grad_dtype = DType::kFloat32;
    StateFormat format = StateFormat::kFloat32;
    bool has_master = false;
  };

  Parameter(Device device, const Spec& spec, uint32_t seed, OptimizerAlgorithm algorithm)
      : spec_(spec),
        has_squares_(algorithm == OptimizerAlgorithm::kAdamW),
        param_(device, to_bytes(spec.param_dtype, values(spec.numel, seed))),
        grad_(device, to_bytes(spec.grad_dtype, values(spec.numel, seed + 1))),
        state1_(device, Bytes(state_bytes(), spec.format == StateFormat::kFloat32 ? 0 : 127)),
        state2_(device, Bytes(state_bytes())),
        absmax1_(device, std::vector<float>(blocks())),
        absmax2_(device, std::vector<float>(blocks())),
        master_(device, to_floats(values(spec.numel, seed))),
        step_(device, std::vector<float>{0.0f}) {}

  OptimizerTensor tensor() {
    OptimizerTensor tensor{.param = param_.data(),
                           .grad = grad_.data(),
                           .state1 = state1_.data(),
                           .step = step_.data(),
                           .numel = spec_.numel,
                           .param_dtype = spec_.param_dtype,
                           .grad_dtype = spec_.grad_dtype,
                           .state_format = spec_.format};
    if (has_squares_) tensor.state2 = state2_.data();
    if (spec_.format == StateFormat::kDynamic8bit) {
      tensor.absmax1 = absmax1_.data();
      if (has_squares_) tensor.absmax2 = absmax2_.data();
    }
    if (spec_.has_master) tensor.master = master_.data();
    return tensor;
  }

  /// Everything that a step writes, as bytes.
  std::vector<Bytes> contents() const {
    return {param_.to_host(),          state1_.to_host(),         state2_.to_host(),
            bytes(absmax1_.to_host()), bytes(absmax2_.to_host()), bytes(master_.to_host()),
            bytes(step_.to_host())};
  }
  std::vector<double> params() const { return from_bytes(spec_.param_dtype, param_.to_host()); }
  float step() const { return step_.to_host()[0]; }

  void expect_guards_intact() const {
    param_.expect_guards_intact();
    grad_.expect_guards_intact();
    state1_.expect_guards_intact();
    state2_.expect_guards_intact();
    absmax1_.expect_guards_intact();
    absmax2_.expect_guards_intact();
    master_.expect_guards_intact();
    step_.expect_guards_intact();
  }

  /// Numbers that look random, over four decades.
  static std::vector<double> values(int64_t numel, uint32_t seed) {
    std::vector<double> result;
    uint32_t state = seed * 2654435761u + 12345u;
    for (int64_t i = 0; i < numel; ++i) {
      state = state * 1664525u + 1013904223u;
      const double uniform = static_cast<double>(state >> 8) / (1 << 23) - 1.0;
      result.push_back(uniform * std::pow(10.0, -static_cast<double>(i % 5)));
    }
    return result;
  }

 private:
  static Bytes bytes(const std::vector<float>& values) {
    const auto* const data = reinterpret_cast<const uint8_t*>(values.data());
    return {data, data + values.size() * sizeof(float)};
  }
  static std::vector<float> to_floats(const std::vector<double>& values) {
    return {values.begin(), values.end()};
  }
  size_t state_bytes() const {
    return static_cast<size_t>(spec_.numel) * (spec_.format == StateFormat::kFloat32 ? 4 : 1);
  }
  size_t blocks() const { return static_cast<size_t>((spec_.numel + 255) / 256); }

  Spec spec_;
  bool has_squares_;
  DeviceArray<uint8_t> param_, grad_, state1_, state2_;
  DeviceArray<float> absmax1_, absmax2_, master_, step_;
};

class Model {
 public:
  Model(Device device, const std::vector<Parameter::Spec>& specs, OptimizerAlgorithm algorithm)
      : device_(device), algorithm_(algorithm) {
    for (size_t i = 0; i < specs.size(); ++i) {
      parameters_.push_back(std::make_unique<Parameter>(
          device, specs[i], static_cast<uint32_t>(10 * i + 1), algorithm));
    }
  }

  std::vector<OptimizerTensor> tensors() {
    std::vector<OptimizerTensor> result;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      result.push_back(parameters_[i]->tensor());
      result.back().random_stream = static_cast<uint32_t>(i);
    }
    return result;
  }

  /// One step; `change` may alter the arguments.
  template <class Change>
  void step(const Change& change) {
    const std::vector<OptimizerTensor> all = tensors();
    const OptimizerGroup group{.lr = 0.01, .weight_decay = 0.1};
    OptimizerStepArgs args{
        .algorithm = algorithm_, .tensors = all, .groups = {&group, 1}, .device = device_};
    change(&args);
    const int64_t bytes = optimizer_step_workspace_bytes(args);
    DeviceArray<uint8_t> workspace(device_, bytes);
    const TestStream stream(device_);
    optimizer_step(args, {workspace.data(), bytes}, stream.get());
    stream.synchronize();
    workspace.expect_guards_intact();
  }
  void step() {
    step([](OptimizerStepArgs*) {});
  }

  std::vector<Bytes> contents() const {
    std::vector<Bytes> result;
    for (const auto& parameter : parameters_) {
      for (Bytes& bytes : parameter->contents()) result.push_back(std::move(bytes));
    }
    return result;
  }
  Parameter& operator[](size_t i) { return *parameters_[i]; }
  void expect_guards_intact() const {
    for (const auto& parameter : parameters_) parameter->expect_guards_intact();
  }

 private:
  Device device_;
  OptimizerAlgorithm algorithm_;
  std::vector<std::unique_ptr<Parameter>> parameters_;
};

}  // namespace qlora_native::testing
