// Listing, forcing and asking after kernels.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <thread>

#include "support/kernel_runs.h"
#include "support/problem.h"

namespace qlora_native::testing {
namespace {

std::vector<double> some_values() { return gaussian(64, DType::kFloat32, 1); }
const WeightSpec kSpec{1, 64, 64, kNF4, false};

TEST(Kernels, NamesAreUniqueWithinAnOperationAndDevice) {
  std::set<std::tuple<Op, DeviceType, std::string>> seen;
  for (const KernelInfo& info : list_kernels()) {
    EXPECT_TRUE(seen.insert({info.op, info.device, info.name}).second) << info.name;
    EXPECT_EQ(info.usable, info.why_not.empty()) << info.name << ": " << info.why_not;
  }
}

TEST(Kernels, EveryOperationHasAReferenceOnTheCpu) {
  for (const Op op : kAllOps) {
    const std::vector<std::string> names = usable_kernels(op, Device::cpu());
    ASSERT_FALSE(names.empty()) << name(op);
    EXPECT_EQ(names.back(), "scalar") << name(op);
  }
}

TEST(Kernels, AForcedNameMustExist) {
  try {
    force_kernel(Op::kQuantize4bit, DeviceType::kCpu, "abacus");
    FAIL() << "expected InvalidArgument";
  } catch (const InvalidArgument& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("abacus"), std::string::npos) << message;
    EXPECT_NE(message.find("quantize_4bit"), std::string::npos) << message;
    EXPECT_NE(message.find("scalar"), std::string::npos) << message;
  }
  EXPECT_EQ(forced_kernel(Op::kQuantize4bit, DeviceType::kCpu), "");
}

TEST(Kernels, AForcedKernelRunsOnEveryThread) {
  {
    const ForcedKernel forced(Op::kQuantize4bit, DeviceType::kCpu, "scalar");
    EXPECT_EQ(forced_kernel(Op::kQuantize4bit, DeviceType::kCpu), "scalar");
    std::thread([] { quantize_on(Device::cpu(), kSpec, DType::kFloat32, some_values()); }).join();
    EXPECT_EQ(last_kernel(Op::kQuantize4bit), "scalar");
  }
  EXPECT_EQ(forced_kernel(Op::kQuantize4bit, DeviceType::kCpu), "");
  quantize_on(Device::cpu(), kSpec, DType::kFloat32, some_values());
  EXPECT_EQ(last_kernel(Op::kQuantize4bit),
            usable_kernels(Op::kQuantize4bit, Device::cpu()).front());
}

TEST(Kernels, TheSelectedKernelIsTheOneThatRuns) {
  for (const Device device : test_devices()) {
    DeviceWeight weight(device, kSpec, random_weight(kSpec, 4));
    DeviceArray<float> output(device, 64);
    const DequantizeArgs args{weight.view(), {output.data(), 64, DType::kFloat32, device}};
    for_each_kernel(Op::kDequantize4bit, device, [&] {
      const TestStream stream(device);
      const std::string selected = selected_kernel(args);
      dequantize_4bit(args, stream.get());
      stream.synchronize();
      EXPECT_EQ(last_kernel(Op::kDequantize4bit), selected);
    });
  }
}

TEST(Kernels, AForcedKernelThatDeclinesSaysWhyAndTouchesNothing) {
  const std::vector<std::string> kernels = usable_kernels(Op::kMatmul4bit, Device::cpu());
  const auto gemv = std::find_if(kernels.begin(), kernels.end(),
                                 [](const std::string& name) { return name.starts_with("gemv"); });
  if (gemv == kernels.end()) GTEST_SKIP() << "no kernel of this processor declines anything";
  const WeightSpec spec{4, 99, 64, kNF4, false};
  DeviceWeight weight(Device::cpu(), spec, random_weight(spec, 2));
  std::vector<float> x(99, 1.0f);
  DeviceArray<float> y(Device::cpu(), 4);
  const MatmulArgs args{{x.data(), 1, 99, 99, DType::kFloat32, {}},
                        weight.view(),
                        {},
                        {y.data(), 1, 4, 4, DType::kFloat32, {}}};
  const ForcedKernel forced(Op::kMatmul4bit, DeviceType::kCpu, *gemv);
  try {
    matmul_4bit(args, {}, Stream::none());
    FAIL() << "expected Unsupported";
  } catch (const Unsupported& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find(*gemv), std::string::npos) << message;
    EXPECT_NE(message.find("99"), std::string::npos) << message;
    EXPECT_NE(message.find("forced"), std::string::npos) << message;
  }
  EXPECT_TRUE(y.is_untouched());
}

TEST(Kernels, AKernelThatTheHardwareLacksCannotRun) {
  bool found = false;
  for (const KernelInfo& info : list_kernels()) {
    if (info.usable || info.op != Op::kDequantize4bit || info.device != DeviceType::kCpu) continue;
    found = true;
    const ForcedKernel forced(info.op, info.device, info.name);
    EXPECT_THROW(dequantize_on(Device::cpu(), kSpec, random_weight(kSpec, 3), DType::kFloat32),
                 Unsupported);
  }
  if (!found) GTEST_SKIP() << "this processor has everything";
}

TEST(Devices, TheCpuComesFirstAndIsDescribed) {
  const std::vector<DeviceInfo> devices = list_devices();
  ASSERT_FALSE(devices.empty());
  EXPECT_EQ(devices[0].device, Device::cpu());
  EXPECT_FALSE(devices[0].name.empty());
  EXPECT_GT(devices[0].memory_bytes, int64_t{64} << 20);
  EXPECT_EQ(devices.size() == 1, !cuda_unavailable_reason().empty());
  EXPECT_EQ(devices.size() > 1, cuda_available());
}

}  // namespace
}  // namespace qlora_native::testing
