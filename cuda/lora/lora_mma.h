// What the tensor-core kernels of adapters take, and how they are cut. Pure host code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "qlora_native/lora.h"

namespace qlora_native::cuda {

inline constexpr int64_t kMaxMmaRank = 512;

bool supports_lora_project_mma(const LoraProjectArgs& args, std::string* why_not);
bool supports_lora_update_mma(const LoraUpdateArgs& args, std::string* why_not);
bool supports_lora_gradient_mma(const LoraGradientArgs& args, std::string* why_not);

/// Thread blocks that share what is summed over, a power of two up to `max_cluster`: as many as it
/// takes to fill the processors, while every warp has work.
inline int cluster_for(int64_t tiles, int64_t units_per_block, int64_t wanted_blocks,
                       int max_cluster) {
  int cluster = 1;
  while (cluster < max_cluster && tiles * cluster < wanted_blocks &&
         units_per_block >= 2 * cluster) {
    cluster *= 2;
  }
  return cluster;
}

}  // namespace qlora_native::cuda
