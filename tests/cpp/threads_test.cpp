// The CPU backend under threads: forks, callers at the same time, and a changed float environment.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "support/kernel_runs.h"
#include "support/number_formats.h"
#include "support/problem.h"

namespace qlora_native::testing {
namespace {

const WeightSpec kSpec{300, 1024, 64, kNF4, true};

class Threads : public ::testing::Test {
 protected:
  void SetUp() override { set_cpu_threads(4); }
  void TearDown() override { set_cpu_threads(threads_before_); }

 private:
  const int threads_before_ = cpu_threads();
};

bool same(const HostWeight& a, const HostWeight& b) {
  return a.packed == b.packed && a.absmax_codes == b.absmax_codes && a.absmax2 == b.absmax2 &&
         a.offset == b.offset;
}

TEST_F(Threads, AForkedChildComputesToo) {
  const std::vector<double> values = gaussian(kSpec.numel(), DType::kFloat32, 1);
  const HostWeight expected = quantize_on(Device::cpu(), kSpec, DType::kFloat32, values);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // A child that waits for threads it does not have ends here.
    bool ok = true;
    for (int i = 0; i < 3; ++i) {
      ok = ok && same(quantize_on(Device::cpu(), kSpec, DType::kFloat32, values), expected);
    }
    _exit(ok ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  EXPECT_TRUE(same(quantize_on(Device::cpu(), kSpec, DType::kFloat32, values), expected));
}

TEST_F(Threads, CallersAtTheSameTimeDoNotDisturbEachOther) {
  const std::vector<double> values = gaussian(kSpec.numel(), DType::kFloat32, 2);
  const HostWeight expected = quantize_on(Device::cpu(), kSpec, DType::kFloat32, values);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 5; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 10; ++i) {
        wrong += !same(quantize_on(Device::cpu(), kSpec, DType::kFloat32, values), expected);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST_F(Threads, TheNumberMayChangeBetweenCalls) {
  const std::vector<double> values = gaussian(kSpec.numel(), DType::kFloat32, 3);
  const HostWeight expected = quantize_on(Device::cpu(), kSpec, DType::kFloat32, values);
  for (const int threads : {1, 9, 2, 5, 1}) {
    set_cpu_threads(threads);
    EXPECT_EQ(cpu_threads(), threads);
    EXPECT_TRUE(same(quantize_on(Device::cpu(), kSpec, DType::kFloat32, values), expected))
        << threads;
  }
}

std::atomic<int> bodies_run{0};

/// An executor of plain threads that round as they like.
void run_on_threads(int threads, void (*body)(void*), void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    others.emplace_back([=] {
      std::fesetround(FE_DOWNWARD);
      body(context);
      ++bodies_run;
    });
  }
  body(context);
  ++bodies_run;
  for (std::thread& other : others) other.join();
}

/// As one that is busy elsewhere may: every call on the caller's thread.
void run_once(int, void (*body)(void*), void* context) {
  body(context);
  ++bodies_run;
}

TEST_F(Threads, AnExecutorReplacesThePool) {
  const std::vector<double> values = gaussian(kSpec.numel(), DType::kFloat32, 5);
  const HostWeight expected = quantize_on(Device::cpu(), kSpec, DType::kFloat32, values);
  for (const CpuExecutor executor : {run_on_threads, run_once}) {
    bodies_run = 0;
    set_cpu_executor(executor);
    const HostWeight actual = quantize_on(Device::cpu(), kSpec, DType::kFloat32, values);
    set_cpu_executor(nullptr);
    EXPECT_TRUE(same(actual, expected));
    EXPECT_GT(bodies_run.load(), 0);
  }
  bodies_run = 0;
  EXPECT_TRUE(same(quantize_on(Device::cpu(), kSpec, DType::kFloat32, values), expected));
  EXPECT_EQ(bodies_run.load(), 0);
}

TEST_F(Threads, AForkedChildForgetsTheExecutor) {
  const std::vector<double> values = gaussian(kSpec.numel(), DType::kFloat32, 6);
  set_cpu_executor(run_once);
  bodies_run = 0;
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);
    quantize_on(Device::cpu(), kSpec, DType::kFloat32, values);
    _exit(bodies_run.load());
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  quantize_on(Device::cpu(), kSpec, DType::kFloat32, values);
  EXPECT_GT(bodies_run.load(), 0);
  set_cpu_executor(nullptr);
}

/// Sets a rounding mode, and flush-to-zero where there is one, and puts the old ones back.
class HostileFloatEnvironment {
 public:
  HostileFloatEnvironment() {
    std::fegetenv(&before_);
    std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
    constexpr unsigned kFlushToZeroAndDenormalsAreZero = 0x8040;
    _mm_setcsr(_mm_getcsr() | kFlushToZeroAndDenormalsAreZero);
#endif
  }
  ~HostileFloatEnvironment() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
};

TEST_F(Threads, TheCallersFloatEnvironmentDoesNotReachTheBytes) {
  std::vector<double> values = gaussian(kSpec.numel(), DType::kFloat32, 4);
  for (double& value : values) value = round_to(DType::kFloat32, value * 1e-38);
  const HostWeight expected = reference_quantize(kSpec, values);
  const std::vector<double> decoded = reference_decode(kSpec, expected);
  const std::vector<uint8_t> input = to_bytes(DType::kFloat32, values);
  const std::vector<uint8_t> expected_output = to_bytes(DType::kFloat32, decoded);
  for_each_kernel(Op::kQuantize4bit, Device::cpu(), [&] {
    DeviceWeight weight(Device::cpu(), kSpec);
    QuantizeArgs args;
    args.input = {input.data(), kSpec.numel(), DType::kFloat32, {}};
    args.output = weight.mutable_view();
    DeviceArray<uint8_t> workspace(Device::cpu(), quantize_4bit_workspace_bytes(args));
    {
      const HostileFloatEnvironment hostile;
      quantize_4bit(args, {workspace.data(), workspace.size()}, Stream::none());
      EXPECT_EQ(std::fegetround(), FE_UPWARD) << "the caller's environment was not put back";
    }
    expect_same_bytes(weight.to_host(), expected);
  });
  for_each_kernel(Op::kDequantize4bit, Device::cpu(), [&] {
    DeviceWeight weight(Device::cpu(), kSpec, expected);
    DeviceArray<uint8_t> output(Device::cpu(), kSpec.numel() * 4);
    {
      const HostileFloatEnvironment hostile;
      dequantize_4bit({weight.view(), {output.data(), kSpec.numel(), DType::kFloat32, {}}},
                      Stream::none());
    }
    EXPECT_EQ(output.to_host(), expected_output);
  });
}

}  // namespace
}  // namespace qlora_native::testing
