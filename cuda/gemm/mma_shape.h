// What a thread block of a product on mma.sync works on (mma_tile.cuh). Pure host arithmetic: no CUDA header.
#pragma once

namespace qlora_native::cuda {

/// A tile of the output, kRows_ x kCols_, by kThreads_ threads: as many as columns, or twice as many. kStages_ steps of
/// 64 along the depth are in shared memory: the one in use and those that are loaded ahead, at least two. kBlocks_ thread
/// blocks share a processor where its shared memory suffices.
template <int kRows_, int kCols_, int kThreads_, int kStages_, int kBlocks_>
struct MmaTileShape {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kThreads = kThreads_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;

  static constexpr int kActivationBytes = kRows * 128;  ///< of a step
  static constexpr int kCodeBytes = kCols * 32;         ///< of a step
  static constexpr int kWeightBytes = kCols * 128;      ///< of a step, decoded
  static constexpr int kMapBytes = 1024;
  /// Stages, two tiles of weights, the dynamic map.
  static constexpr int kSharedBytes =
      kStages * (kActivationBytes + kCodeBytes) + 2 * kWeightBytes + kMapBytes;

  /// Whether a thread can have 255 registers: then it decodes while it multiplies, else before.
  static constexpr bool kHasAllRegisters = kThreads * kBlocks <= 256;
};

}  // namespace qlora_native::cuda
