#include "host/launch_number.h"

#include <atomic>
#include <random>

namespace qlora_native::cuda {

uint64_t next_launch() {
  static std::atomic<uint64_t> launches{[] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }()};
  return launches.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace qlora_native::cuda
