// How many clusters of thread blocks run at a time.
#pragma once

#include <cstdint>

#include "qlora_native/device.h"

namespace qlora_native::cuda {

inline constexpr int kMaxClusterSize = 8;  ///< what every device of compute capability 9.0 allows

/// of[size]: clusters of `size` thread blocks that run at a time when every block has a processor to itself;
/// of[1] is the number of processors. Less than of[1] / size for many sizes: a cluster lies within one GPC, and
/// how many processors those have differs from device to device.
struct ClusterCounts {
  int64_t of[kMaxClusterSize + 1] = {};
};

/// Of a device of compute capability 9.0 or more. The driver is asked once per device. Throws CudaError.
const ClusterCounts& cluster_counts(Device device);

}  // namespace qlora_native::cuda
