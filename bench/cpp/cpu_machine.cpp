#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <thread>

#include "machine.h"

namespace bench {
namespace {

constexpr std::align_val_t kAlignment{256};
constexpr int64_t kCopyBytes = int64_t{256} << 20;

/// memcpy by as many threads as the library uses: one alone does not fill the memory's channels.
void copy_in_parallel(char* to, const char* from, int64_t size_bytes) {
  const int threads = qlora_native::cpu_threads();
  const int64_t share = (size_bytes + threads - 1) / threads;
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    const int64_t begin = std::min(size_bytes, i * share);
    const int64_t count = std::min(share, size_bytes - begin);
    others.emplace_back([=] { std::memcpy(to + begin, from + begin, static_cast<size_t>(count)); });
  }
  std::memcpy(to, from, static_cast<size_t>(std::min(share, size_bytes)));
  for (std::thread& other : others) other.join();
}

qlora_native::DeviceInfo info_of(qlora_native::Device device) {
  for (const qlora_native::DeviceInfo& info : qlora_native::list_devices()) {
    if (info.device == device) return info;
  }
  return {.device = device, .name = qlora_native::to_string(device), .features = ""};
}

class CpuMachine final : public Machine {
 public:
  qlora_native::Device device() const override { return qlora_native::Device::cpu(); }
  std::string name() const override {
    const int threads = qlora_native::cpu_threads();
    return model() + " (" + features() + "), " + std::to_string(threads) +
           (threads == 1 ? " thread" : " threads");
  }
  qlora_native::Stream stream() const override { return qlora_native::Stream::none(); }
  void synchronize() override {}

  void* allocate(int64_t size_bytes) override {
    return ::operator new(static_cast<size_t>(size_bytes), kAlignment);
  }
  void release(void* data) override { ::operator delete(data, kAlignment); }
  void copy_to_device(void* to, const void* from, int64_t size_bytes) override {
    std::memcpy(to, from, static_cast<size_t>(size_bytes));
  }
  void copy_to_host(void* to, const void* from, int64_t size_bytes) override {
    std::memcpy(to, from, static_cast<size_t>(size_bytes));
  }
  int64_t cold_bytes() const override { return 0; }

  std::function<double()> replay(const std::vector<std::function<void()>>& calls) override {
    return [&calls] {
      const auto begin = std::chrono::steady_clock::now();
      for (const auto& call : calls) call();
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
  }

  double measure_copy_rate(double min_seconds) override {
    const Buffer from(*this, kCopyBytes);
    const Buffer to(*this, kCopyBytes);
    std::memset(from.as(), 1, kCopyBytes);
    std::memset(to.as(), 2, kCopyBytes);
    const std::vector<std::function<void()>> copy = {
        [&] { copy_in_parallel(to.as<char>(), from.as<char>(), kCopyBytes); }};
    return 2.0 * kCopyBytes / median_seconds(replay(copy), min_seconds);
  }
  std::string copy_method() const override { return "memcpy of 256 MiB by all threads"; }
  std::string timing_method() const override {
    return "calls in a row on the same memory, which the caches may hold";
  }
};

}  // namespace

std::string Machine::model() const { return info_of(device()).name; }
std::string Machine::features() const { return info_of(device()).features; }

double median_seconds(const std::function<double()>& run, double min_seconds) {
  constexpr size_t kLeastRounds = 5;
  std::vector<double> samples;
  run();
  for (double total = 0; samples.size() < kLeastRounds || total < min_seconds;) {
    samples.push_back(run());
    total += samples.back();
  }
  const auto middle = samples.begin() + std::ssize(samples) / 2;
  std::nth_element(samples.begin(), middle, samples.end());
  return *middle;
}

std::unique_ptr<Machine> make_cpu_machine() { return std::make_unique<CpuMachine>(); }

}  // namespace bench
