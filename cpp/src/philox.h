// The random numbers of dropout and of stochastic rounding, for host and device.
#pragma once

#include <cstdint>

namespace qlora_native {

struct RandomWords {
  uint32_t words[4];
};

/// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
constexpr RandomWords philox(uint64_t key, uint64_t low_counter, uint32_t counter2,
                             uint32_t counter3) {
  auto key0 = static_cast<uint32_t>(key);
  auto key1 = static_cast<uint32_t>(key >> 32);
  RandomWords x{{static_cast<uint32_t>(low_counter), static_cast<uint32_t>(low_counter >> 32),
                 counter2, counter3}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * x.words[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * x.words[2];
    x = {{static_cast<uint32_t>(product1 >> 32) ^ x.words[1] ^ key0,
          static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ x.words[3] ^ key1,
          static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return x;
}

}  // namespace qlora_native
