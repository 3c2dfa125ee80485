// Times with events around a CUDA graph of all calls: launches cost what they cost in a captured
// training step, and the host is not in the way of kernels that take a few microseconds.
#include <cuda_runtime_api.h>

#include "machine.h"
#include "qlora_native/error.h"

namespace bench {
namespace {

constexpr int kColdMultiple = 4;
constexpr int64_t kCopyBytes = int64_t{1} << 30;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw qlora_native::CudaError(status, std::string(what) + ": " + cudaGetErrorString(status));
}

class CudaMachine final : public Machine {
 public:
  explicit CudaMachine(int index) : index_(index) {
    check(cudaSetDevice(index), "cudaSetDevice");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~CudaMachine() override {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }

  qlora_native::Device device() const override { return qlora_native::Device::cuda(index_); }
  std::string name() const override { return model() + " (" + features() + ")"; }
  qlora_native::Stream stream() const override {
    return qlora_native::Stream::from_handle(stream_);
  }
  void synchronize() override { check(cudaStreamSynchronize(stream_), "synchronize"); }

  void* allocate(int64_t size_bytes) override {
    void* data = nullptr;
    if (cudaMalloc(&data, static_cast<size_t>(size_bytes)) != cudaSuccess) {
      cudaGetLastError();
      throw qlora_native::OutOfMemory("cudaMalloc of " + std::to_string(size_bytes) + " bytes");
    }
    return data;
  }
  void release(void* data) override { cudaFree(data); }
  void copy_to_device(void* to, const void* from, int64_t size_bytes) override {
    copy(to, from, size_bytes);
  }
  void copy_to_host(void* to, const void* from, int64_t size_bytes) override {
    copy(to, from, size_bytes);
  }

  int64_t cold_bytes() const override {
    int l2_bytes = 0;
    check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, index_),
          "cudaDeviceGetAttribute");
    return int64_t{kColdMultiple} * l2_bytes;
  }

  std::function<double()> replay(const std::vector<std::function<void()>>& calls) override {
    // Once outside the capture: a kernel's module is loaded at its first launch.
    calls.front()();
    check(cudaStreamSynchronize(stream_), "warm-up");
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "begin capture");
    for (const auto& call : calls) call();
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream_, &graph), "end capture");
    cudaGraphExec_t raw = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&raw, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "cudaGraphInstantiate");
    const std::shared_ptr<CUgraphExec_st> executable(raw, cudaGraphExecDestroy);
    return [this, executable] {
      return seconds_of(
          [&] { check(cudaGraphLaunch(executable.get(), stream_), "cudaGraphLaunch"); });
    };
  }

  double measure_copy_rate(double min_seconds) override {
    const Buffer from(*this, kCopyBytes);
    const Buffer to(*this, kCopyBytes);
    check(cudaMemsetAsync(from.as(), 1, kCopyBytes, stream_), "cudaMemsetAsync");
    // Not as a node of a graph, where a copy of this size ran at two thirds of the rate.
    const auto copy_once = [&] {
      return seconds_of([&] {
        check(cudaMemcpyAsync(to.as(), from.as(), kCopyBytes, cudaMemcpyDeviceToDevice, stream_),
              "cudaMemcpyAsync");
      });
    };
    return 2.0 * kCopyBytes / median_seconds(copy_once, min_seconds);
  }
  std::string copy_method() const override { return "cudaMemcpy of 1 GiB from device to device"; }
  std::string timing_method() const override {
    return "replays of a CUDA graph over memory that takes turns, more than " +
           std::to_string(kColdMultiple) + " times the L2 cache";
  }

 private:
  /// The time between the events around what `queue` queues.
  template <class Queue>
  double seconds_of(const Queue& queue) {
    check(cudaEventRecord(begin_, stream_), "cudaEventRecord");
    queue();
    check(cudaEventRecord(end_, stream_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "timing");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return milliseconds * 1e-3;
  }

  void copy(void* to, const void* from, int64_t size_bytes) {
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(size_bytes), cudaMemcpyDefault, stream_),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_), "copy");
  }

  int index_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

}  // namespace

std::unique_ptr<Machine> make_cuda_machine(int index) {
  for (const qlora_native::DeviceInfo& info : qlora_native::list_devices()) {
    if (info.device == qlora_native::Device::cuda(index)) {
      return std::make_unique<CudaMachine>(index);
    }
  }
  return nullptr;
}

}  // namespace bench
