#include <cuda_runtime_api.h>

#include <chrono>
#include <functional>
#include <string>

#include "host_link.h"
#include "machine.h"
#include "qlora_native/error.h"

namespace bench {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw qlora_native::CudaError(status, std::string(what) + ": " + cudaGetErrorString(status));
}

/// A pinned and a device array with a stream to copy on.
class Direction {
 public:
  Direction(int64_t size_bytes, cudaMemcpyKind kind)
      : size_(static_cast<size_t>(size_bytes)), kind_(kind) {
    check(cudaMallocHost(&host_, size_), "cudaMallocHost");
    check(cudaMalloc(&device_, size_), "cudaMalloc");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~Direction() {
    cudaStreamDestroy(stream_);
    cudaFree(device_);
    cudaFreeHost(host_);
  }
  Direction(const Direction&) = delete;
  Direction& operator=(const Direction&) = delete;

  void queue() {
    const bool to_device = kind_ == cudaMemcpyHostToDevice;
    check(cudaMemcpyAsync(to_device ? device_ : host_, to_device ? host_ : device_, size_, kind_,
                          stream_),
          "cudaMemcpyAsync");
  }
  void wait() { check(cudaStreamSynchronize(stream_), "copy"); }

 private:
  const size_t size_;
  const cudaMemcpyKind kind_;
  void* host_ = nullptr;
  void* device_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

double seconds_of(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

LinkRates measure_link(int64_t size_bytes, double min_seconds) {
  Direction in(size_bytes, cudaMemcpyHostToDevice);
  Direction out(size_bytes, cudaMemcpyDeviceToHost);
  const auto seconds = [&](bool goes_in, bool goes_out) {
    return median_seconds(
        [&] {
          return seconds_of([&] {
            if (goes_in) in.queue();
            if (goes_out) out.queue();
            if (goes_in) in.wait();
            if (goes_out) out.wait();
          });
        },
        min_seconds);
  };
  const auto bytes = static_cast<double>(size_bytes);
  return {.to_device = bytes / seconds(true, false),
          .to_host = bytes / seconds(false, true),
          .both = 2 * bytes / seconds(true, true)};
}

}  // namespace bench
