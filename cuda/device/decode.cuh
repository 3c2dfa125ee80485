// From codes to floats: the sixteen values, and the scale of a block in either of its two forms.
#pragma once

#include <cstdint>

#include "device/grid_dependency.cuh"
#include "device/shared_memory.cuh"
#include "qlora_native/codebook.h"

namespace qlora_native::cuda {

/// The dynamic map where kernels can index it: 2 KB, in the L1 cache of every SM that uses it.
static __device__ const DynamicMap kDynamicMapOnDevice = kSignedDynamicMap;

/// Sixteen fp32 values in shared memory. Any 32 lookups are free of bank conflicts: sixteen words
/// lie in sixteen banks, and lanes that want the same word share one read. Aligned to 256 bytes, so
/// that the lowest byte of an entry's address is its offset in the table.
struct alignas(256) LookupTable {
  float values[16];

  /// Threads 0..15 of the thread block fill it; a __syncthreads() must follow.
  __device__ __forceinline__ void fill(const Codebook& codebook) {
    if (threadIdx.x < 16) values[threadIdx.x] = codebook.values[threadIdx.x];
  }
  __device__ __forceinline__ float operator[](uint32_t code) const { return values[code]; }
};

/// Decodes the first `kCodes` of the eight codes of a 32-bit word (four bytes in memory order, the
/// first element of each in its high nibble).
template <int kCodes>
__device__ __forceinline__ void decode_word(const LookupTable& table, uint32_t word,
                                            float (&out)[kCodes]) {
  const uint32_t base = shared_address(table.values);
  // Byte i of `first` and `second` is the offset of an entry: a mask and a shift serve four codes,
  // and one permutation per code puts the offset in place of the base's lowest byte.
  const uint32_t first = (word >> 2) & 0x3c3c3c3cu;
  const uint32_t second = (word << 2) & 0x3c3c3c3cu;
#pragma unroll
  for (int byte = 0; byte < kCodes / 2; ++byte) {
    out[2 * byte] = load_shared(__byte_perm(first, base, 0x7650 + byte));
    out[2 * byte + 1] = load_shared(__byte_perm(second, base, 0x7650 + byte));
  }
}

__device__ __forceinline__ void decode8(const LookupTable& table, uint32_t word, float (&out)[8]) {
  decode_word(table, word, out);
}

/// The code of element `elem` of a packed array: any alignment, one byte read.
__device__ __forceinline__ uint32_t load_code(const uint8_t* packed, int64_t elem) {
  const uint32_t byte = packed[elem >> 1];
  return elem % 2 == 0 ? byte >> 4 : byte & 0xfu;
}

/// Where the scales lie: a kernel parameter. Exactly one of `values` and `codes` is null.
struct BlockScales {
  const float* values;
  const uint8_t* codes;
  const float* absmax2;
  const float* offset;
  int block_shift;  ///< log2(block_size)
};

/// What was loaded for a block, before the arithmetic: so that loads of several blocks can be in
/// flight.
struct RawScale {
  float value;    ///< absmax, or absmax2 when double-quantized
  uint32_t code;  ///< double-quantized only
};

/// The scale of a double-quantized block from its code's entry in the dynamic map. Two rounded
/// operations, never an FMA: the same bits on every backend.
__device__ __forceinline__ float decode_scale(float map_value, float absmax2, float offset) {
  return __fadd_rn(__fmul_rn(map_value, absmax2), offset);
}

/// Loads through the read-only path, in kernels that do not overlap the one before.
struct ReadOnlyLoads {
  template <class V>
  __device__ static __forceinline__ V load(const V* source) {
    return __ldg(source);
  }
};

/// Loads in kernels that do.
struct LoadsAfterWait {
  template <class V>
  __device__ static __forceinline__ auto load(const V* source) {
    return load_after_wait(source);
  }
};

/// Reads the scale of a block. `kDoubleQuant` says which form `scales` has.
template <bool kDoubleQuant, class Loads = ReadOnlyLoads>
class ScaleReader {
 public:
  __device__ __forceinline__ explicit ScaleReader(const BlockScales& scales) : scales_(scales) {
    // An array without elements may come without an offset.
    if constexpr (kDoubleQuant) {
      offset_ = scales.offset == nullptr ? 0.0f : Loads::load(scales.offset);
    }
  }

  __device__ __forceinline__ RawScale load(uint64_t elem) const {
    return load_block(elem >> scales_.block_shift);
  }

  /// Of unit `unit` of 64 elements, in blocks of 64 or more.
  __device__ __forceinline__ RawScale load_unit(uint32_t unit) const {
    return load_block(unit >> (scales_.block_shift - 6));
  }

  __device__ __forceinline__ RawScale load_block(uint64_t block) const {
    if constexpr (kDoubleQuant) {
      return {Loads::load(scales_.absmax2 + block / kGroupSize),
              Loads::load(scales_.codes + block)};
    } else {
      return {Loads::load(scales_.values + block), 0};
    }
  }

  __device__ __forceinline__ float decode(RawScale raw) const {
    return decode(raw, kDynamicMapOnDevice.values);
  }

  /// With a copy of the dynamic map's values, say in shared memory.
  __device__ __forceinline__ float decode(RawScale raw, const float* map) const {
    if constexpr (kDoubleQuant) {
      return decode_scale(map[raw.code], raw.value, offset_);
    } else {
      return raw.value;
    }
  }

 private:
  const BlockScales& scales_;
  float offset_ = 0.0f;
};

}  // namespace qlora_native::cuda
