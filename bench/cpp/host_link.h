// The link between host and device, as paged memory uses it.
#pragma once

#include <cstdint>

namespace bench {

/// Bytes per second of copies of `size_bytes` between pinned host memory and the current device.
struct LinkRates {
  double to_device;
  double to_host;
  double both;  ///< bytes of both directions, at the same time
};

/// Medians, each over at least `min_seconds`. All zero in a build without CUDA.
LinkRates measure_link(int64_t size_bytes, double min_seconds);

}  // namespace bench
