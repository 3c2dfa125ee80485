// What the thread blocks of one launch tell each other by, in memory that may hold anything.
#pragma once

#include <cstdint>

namespace qlora_native::cuda {

/// A number that neither another launch has nor memory by chance; a replay of a CUDA graph has that of its capture.
uint64_t next_launch();

}  // namespace qlora_native::cuda
