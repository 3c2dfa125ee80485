#include "host/cluster_occupancy.h"

#include <map>
#include <mutex>

#include "host/launch.h"

namespace qlora_native::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kSharedBytes = 200 * 1024;  // more than half of a processor's

/// Asked in place of the kernels that are launched in clusters.
__global__ void representative_of_clusters() {}

int ask_driver(Device device, int size) {
  const DeviceGuard guard(device.index);
  allow_shared_memory(representative_of_clusters, kSharedBytes);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(size));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  QN_CUDA_TRY(cudaOccupancyMaxActiveClusters(&count, representative_of_clusters, &config));
  return count;
}

}  // namespace

const ClusterCounts& cluster_counts(Device device) {
  static std::mutex mutex;
  static std::map<int, ClusterCounts> known;  // its elements stay where they are
  const std::lock_guard lock(mutex);
  const auto found = known.find(device.index);
  if (found != known.end()) return found->second;
  ClusterCounts counts;
  for (int size = 1; size <= kMaxClusterSize; ++size) counts.of[size] = ask_driver(device, size);
  return known.emplace(device.index, counts).first->second;
}

}  // namespace qlora_native::cuda
