// Optimizer steps and gradient norms: every kernel on every device against fp64 formulas, and
// against the portable kernel, whose bits all others have.
#include "qlora_native/optimizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "support/device_array.h"
#include "support/kernel_runs.h"
#include "support/number_formats.h"
#include "support/optimizer_model.h"

namespace qlora_native::testing {
namespace {

constexpr OptimizerAlgorithm kAlgorithms[] = {OptimizerAlgorithm::kAdamW,
                                              OptimizerAlgorithm::kLion};

/// Every combination of types, with sizes around those of blocks and thread blocks.
std::vector<Parameter::Spec> all_specs() {
  std::vector<Parameter::Spec> specs;
  const int64_t sizes[] = {1, 255, 256, 257, 2049, 8193, 20000};
  size_t next = 0;
  for (const StateFormat format : {StateFormat::kFloat32, StateFormat::kDynamic8bit}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const DType grad : {dtype, DType::kFloat32}) {
        for (const bool master : {false, true}) {
          if (master && dtype == DType::kFloat32) continue;
          for (int i = 0; i < 2; ++i) {
            specs.push_back({sizes[next++ % std::size(sizes)], dtype, grad, format, master});
          }
        }
      }
    }
  }
  specs.push_back({0});
  return specs;
}

TEST(OptimizerStep, EveryKernelGivesThePortableOnesBits) {
  for (const OptimizerAlgorithm algorithm : kAlgorithms) {
    for (const bool stochastic : {false, true}) {
      const auto change = [&](OptimizerStepArgs* args) {
        args->stochastic_rounding = stochastic;
        args->seed = 0x123456789abcdefu;
      };
      std::vector<Bytes> expected;
      {
        const ForcedKernel forced(Op::kOptimizerStep, DeviceType::kCpu, "scalar");
        Model model(Device::cpu(), all_specs(), algorithm);
        for (int i = 0; i < 3; ++i) model.step(change);
        expected = model.contents();
      }
      for (const Device device : test_devices()) {
        for_each_kernel(Op::kOptimizerStep, device, [&] {
          Model model(device, all_specs(), algorithm);
          for (int i = 0; i < 3; ++i) model.step(change);
          EXPECT_EQ(model.contents(), expected)
              << to_string(device) << ' ' << last_kernel(Op::kOptimizerStep);
          model.expect_guards_intact();
        });
      }
    }
  }
}

TEST(OptimizerStep, AdamWIsItsFormulas) {
  constexpr int64_t kNumel = 1000;
  for (const Device device : test_devices()) {
    Model model(device, {{kNumel}}, OptimizerAlgorithm::kAdamW);
    std::vector<double> p = model[0].params();
    const std::vector<double> g =
        from_bytes(DType::kFloat32, to_bytes(DType::kFloat32, Parameter::values(kNumel, 2)));
    std::vector<double> m(kNumel), v(kNumel);
    for (int t = 1; t <= 10; ++t) {
      model.step();
      for (size_t i = 0; i < kNumel; ++i) {
        p[i] *= 1 - 0.01 * 0.1;
        m[i] = 0.9 * m[i] + 0.1 * g[i];
        v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
        p[i] -= 0.01 * (m[i] / (1 - std::pow(0.9, t))) /
                (std::sqrt(v[i] / (1 - std::pow(0.999, t))) + 1e-8);
      }
    }
    const std::vector<double> actual = model[0].params();
    for (size_t i = 0; i < kNumel; ++i) EXPECT_NEAR(actual[i], p[i], 1e-6) << i;
    EXPECT_EQ(model[0].step(), 10.0f);
  }
}

TEST(OptimizerStep, MoreTensorsThanALaunchTakes) {
  const std::vector<Parameter::Spec> many(1001, {3});
  for (const Device device : test_devices()) {
    Model together(device, many, OptimizerAlgorithm::kAdamW);
    together.step();
    const std::vector<Bytes> all = together.contents();
    Model single(device, {{3}}, OptimizerAlgorithm::kAdamW);
    single.step();
    EXPECT_EQ(std::vector<Bytes>(all.begin(), all.begin() + 7), single.contents());
    for (size_t i = 0; i < many.size(); ++i) EXPECT_EQ(together[i].step(), 1.0f) << i;
  }
}

TEST(OptimizerStep, RunsOfAParameterGiveWhatTheWholeGives) {
  for (const StateFormat format : {StateFormat::kFloat32, StateFormat::kDynamic8bit}) {
    for (const Device device : test_devices()) {
      const Parameter::Spec spec{5000, DType::kBFloat16, DType::kFloat32, format};
      const auto stochastic = [](OptimizerStepArgs* args) { args->stochastic_rounding = true; };
      Model whole(device, {spec}, OptimizerAlgorithm::kAdamW);
      Model cut(device, {spec}, OptimizerAlgorithm::kAdamW);
      for (int t = 0; t < 3; ++t) {
        whole.step(stochastic);
        std::vector<OptimizerTensor> runs;
        for (const int64_t begin : {int64_t{0}, int64_t{256}, int64_t{4096}}) {
          const int64_t end = begin == 0 ? 256 : begin == 256 ? 4096 : 5000;
          OptimizerTensor run = cut.tensors()[0];
          const int64_t state_size = format == StateFormat::kFloat32 ? 4 : 1;
          run.param = static_cast<uint16_t*>(run.param) + begin;
          run.grad = static_cast<const float*>(run.grad) + begin;
          run.state1 = static_cast<uint8_t*>(run.state1) + begin * state_size;
          run.state2 = static_cast<uint8_t*>(run.state2) + begin * state_size;
          if (run.absmax1) run.absmax1 += begin / 256;
          if (run.absmax2) run.absmax2 += begin / 256;
          run.numel = end - begin;
          run.first_element = begin;
          run.advances_step = end == 5000;
          runs.push_back(run);
        }
        cut.step([&](OptimizerStepArgs* args) {
          args->stochastic_rounding = true;
          args->tensors = runs;
        });
      }
      EXPECT_EQ(whole.contents(), cut.contents());
      cut.expect_guards_intact();
    }
  }
}

TEST(OptimizerStep, WhatTheDeviceHoldsDecides) {
  for (const Device device : test_devices()) {
    const float infinity = std::numeric_limits<float>::infinity();
    DeviceArray<float> numbers(device, std::vector<float>{1.0f, 0.0f, infinity, 0.02f, 4.0f});
    float* const data = numbers.data();
    const std::vector<Parameter::Spec> specs = {
        {300}, {300, DType::kFloat32, DType::kFloat32, StateFormat::kDynamic8bit}};
    Model untouched(device, specs, OptimizerAlgorithm::kAdamW);
    Model model(device, specs, OptimizerAlgorithm::kAdamW);
    model.step([&](OptimizerStepArgs* args) { args->found_inf = data; });
    model.step([&](OptimizerStepArgs* args) {
      args->grad_norm = data + 2;
      args->skip_nonfinite = true;
    });
    EXPECT_EQ(model.contents(), untouched.contents());
    model.step([&](OptimizerStepArgs* args) { args->found_inf = data + 1; });
    EXPECT_NE(model.contents(), untouched.contents());
    EXPECT_EQ(model[0].step(), 1.0f);

    // A learning rate on the device, and a scale that cancels in AdamW but for eps.
    Model a(device, specs, OptimizerAlgorithm::kAdamW);
    Model b(device, specs, OptimizerAlgorithm::kAdamW);
    const OptimizerGroup on_device{.lr = 7.0, .lr_on_device = data + 3, .weight_decay = 0.1};
    const OptimizerGroup by_value{.lr = double{0.02f}, .weight_decay = 0.1};
    a.step([&](OptimizerStepArgs* args) { args->groups = {&on_device, 1}; });
    b.step([&](OptimizerStepArgs* args) { args->groups = {&by_value, 1}; });
    EXPECT_EQ(a.contents(), b.contents());
    a.step([&](OptimizerStepArgs* args) { args->grad_scale = data + 4; });
    EXPECT_NE(a.contents(), b.contents());
  }
}

TEST(OptimizerStep, WrongArgumentsAreRefusedAndTouchNothing) {
  struct Case {
    const char* words;
    void (*change)(OptimizerTensor* tensor, OptimizerGroup* group, OptimizerStepArgs* args);
  };
  using T = OptimizerTensor;
  using G = OptimizerGroup;
  using A = OptimizerStepArgs;
  const Case cases[] = {
      {"param of tensor 0 is null", [](T* t, G*, A*) { t->param = nullptr; }},
      {"grad of tensor 0 is null", [](T* t, G*, A*) { t->grad = nullptr; }},
      {"state1 of tensor 0 is null", [](T* t, G*, A*) { t->state1 = nullptr; }},
      {"state2 of tensor 0 is null", [](T* t, G*, A*) { t->state2 = nullptr; }},
      {"step of tensor 0 is null", [](T* t, G*, A*) { t->step = nullptr; }},
      {"absmax1 of tensor 0 is null",
       [](T* t, G*, A*) { t->state_format = StateFormat::kDynamic8bit; }},
      {"absmax1 of tensor 0 is given", [](T* t, G*, A*) { t->absmax1 = t->step; }},
      {"master of tensor 0 is given", [](T* t, G*, A*) { t->master = t->step; }},
      {"state2 of tensor 0 is given", [](T*, G*, A* a) { a->algorithm = kAlgorithms[1]; }},
      {"-1 elements", [](T* t, G*, A*) { t->numel = -1; }},
      {"group 3, there are 1", [](T* t, G*, A*) { t->group = 3; }},
      {"unknown dtype", [](T* t, G*, A*) { t->param_dtype = static_cast<DType>(9); }},
      {"its gradient bfloat16", [](T* t, G*, A*) { t->grad_dtype = DType::kBFloat16; }},
      {"element 100", [](T* t, G*, A*) { t->first_element = 100; }},
      {"beta1 1", [](T*, G* g, A*) { g->beta1 = 1.0; }},
      {"beta2 -0.5", [](T*, G* g, A*) { g->beta2 = -0.5; }},
      {"lr nan", [](T*, G* g, A*) { g->lr = std::nan(""); }},
      {"eps -1", [](T*, G* g, A*) { g->eps = -1; }},
      {"weight_decay inf", [](T*, G* g, A*) { g->weight_decay = HUGE_VAL; }},
      {"max_norm is -1", [](T*, G*, A* a) { a->max_norm = -1; }},
      {"need grad_norm", [](T*, G*, A* a) { a->max_norm = 1; }},
      {"need grad_norm", [](T*, G*, A* a) { a->skip_nonfinite = true; }},
      {"algorithm code 7", [](T*, G*, A* a) { a->algorithm = static_cast<OptimizerAlgorithm>(7); }},
  };
  Model model(Device::cpu(), {{300}}, OptimizerAlgorithm::kAdamW);
  const std::vector<Bytes> before = model.contents();
  for (const Case& wrong : cases) {
    std::vector<OptimizerTensor> tensors = model.tensors();
    OptimizerGroup group;
    OptimizerStepArgs args;
    args.tensors = tensors;
    args.groups = {&group, 1};
    wrong.change(tensors.data(), &group, &args);
    try {
      optimizer_step(args, {}, Stream::none());
      ADD_FAILURE() << "expected InvalidArgument: " << wrong.words;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(wrong.words), std::string::npos) << error.what();
    }
  }
  EXPECT_EQ(model.contents(), before);
}

TEST(GradientNorm, IsTheNormOfAllArrays) {
  const std::pair<int64_t, DType> arrays[] = {{100000, DType::kFloat32}, {1, DType::kFloat16},
                                              {8192, DType::kBFloat16},  {0, DType::kFloat32},
                                              {8193, DType::kFloat16},   {77, DType::kFloat32}};
  for (const Device device : test_devices()) {
    for_each_kernel(Op::kGradientNorm, device, [&] {
      std::vector<std::unique_ptr<DeviceArray<uint8_t>>> memory;
      std::vector<VectorView> grads;
      double sum = 0;
      for (const auto& [size, dtype] : arrays) {
        const Bytes bytes = to_bytes(dtype, Parameter::values(size, static_cast<uint32_t>(size)));
        for (const double x : from_bytes(dtype, bytes)) sum += x * x;
        memory.push_back(std::make_unique<DeviceArray<uint8_t>>(device, bytes));
        grads.push_back({memory.back()->data(), size, dtype, device});
      }
      DeviceArray<float> norm(device, 1);
      const GradientNormArgs args{grads, norm.data(), device};
      const int64_t bytes = gradient_norm_workspace_bytes(args);
      DeviceArray<uint8_t> workspace(device, bytes);
      const TestStream stream(device);
      gradient_norm(args, {workspace.data(), bytes}, stream.get());
      stream.synchronize();
      EXPECT_NEAR(norm.to_host()[0], std::sqrt(sum), 2e-7 * std::sqrt(sum));
      workspace.expect_guards_intact();

      const GradientNormArgs nothing{{}, norm.data(), device};
      gradient_norm(nothing, {}, stream.get());
      stream.synchronize();
      EXPECT_EQ(norm.to_host()[0], 0.0f);
    });
  }
}

TEST(GradientNorm, WrongArgumentsAreRefused) {
  float norm = 5;
  const VectorView negative{&norm, -1, DType::kFloat32, Device::cpu()};
  const VectorView missing{nullptr, 3, DType::kFloat32, Device::cpu()};
  const VectorView elsewhere{&norm, 1, DType::kFloat32, Device::cuda(3)};
  for (const VectorView& wrong : {negative, missing, elsewhere}) {
    EXPECT_THROW(gradient_norm({{&wrong, 1}, &norm, Device::cpu()}, {}, Stream::none()),
                 InvalidArgument);
  }
  EXPECT_THROW(gradient_norm({{}, nullptr, Device::cpu()}, {}, Stream::none()), InvalidArgument);
  EXPECT_EQ(norm, 5);
}

}  // namespace
}  // namespace qlora_native::testing
