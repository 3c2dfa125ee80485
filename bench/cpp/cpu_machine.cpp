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

class CpuMachine final : public Machine {
 public:
  qlora_native::Device device() const override { return qlora_native::Device::cpu(); }
  std::string name() const override {
    return qlora_native::list_devices().front().name + ", " +
           std::to_string(qlora_native::cpu_threads()) + " threads";
  }
  qlora_native::Stream stream() const override { return qlora_native::Stream::none(); }

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

  double measure_copy_rate() override {
    const Buffer from(*this, kCopyBytes);
    const Buffer to(*this, kCopyBytes);
    std::memset(from.as(), 1, kCopyBytes);
    std::memset(to.as(), 2, kCopyBytes);
    const std::vector<std::function<void()>> copy = {
        [&] { copy_in_parallel(to.as<char>(), from.as<char>(), kCopyBytes); }};
    return 2.0 * kCopyBytes / median_seconds(replay(copy), 15);
  }
};

}  // namespace

double median_seconds(const std::function<double()>& run, int rounds) {
  std::vector<double> seconds(static_cast<size_t>(rounds));
  run();
  for (double& value : seconds) value = run();
  std::nth_element(seconds.begin(), seconds.begin() + rounds / 2, seconds.end());
  return seconds[static_cast<size_t>(rounds / 2)];
}

std::unique_ptr<Machine> make_cpu_machine() { return std::make_unique<CpuMachine>(); }

}  // namespace bench
