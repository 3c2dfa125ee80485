// From floats to codes: the absolute maximum on bit patterns, and the search of the decision points.
#pragma once

#include <cstdint>

#include "qlora_native/codebook.h"

namespace qlora_native::cuda {

inline constexpr uint32_t kInfinityBits = 0x7f800000u;
inline constexpr uint32_t kNaNBits = 0x7fc00000u;

/// |x| as bits: unsigned comparison orders finite values as floats, and puts infinity and NaN above.
__device__ __forceinline__ uint32_t abs_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

/// What a block, or a group of blocks, is scaled by.
struct ScaleOf {
  float absmax;      ///< as stored: the maximum, 0, or NaN
  float reciprocal;  ///< 1 / absmax, or 0 when everything gets the zero code
  bool valid;        ///< false: zero codes

  /// From the largest `abs_bits`. The reciprocal is IEEE: the codes must be those of the CPU.
  __device__ __forceinline__ explicit ScaleOf(uint32_t max_bits) {
    absmax = __uint_as_float(max_bits);
    reciprocal = __frcp_rn(absmax);
    valid = max_bits < kInfinityBits && abs_bits(reciprocal) < kInfinityBits;
    if (max_bits >= kInfinityBits) {
      absmax = __uint_as_float(kNaNBits);
    } else if (!valid) {
      absmax = 0.0f;
    }
    if (!valid) reciprocal = 0.0f;
  }
};

/// The fifteen decision points as a search tree in shared memory: node i has the children 2i and
/// 2i + 1, the root is node 1, and four steps end at leaf 16 + rank. One read per step, free of bank
/// conflicts.
struct DecisionTree {
  float points[16];       ///< entry 0 is not used
  uint32_t code_of_rank[16];

  /// Threads 0..15 of the thread block fill it; a __syncthreads() must follow.
  __device__ __forceinline__ void fill(const Codebook& codebook) {
    const int node = static_cast<int>(threadIdx.x);
    if (node >= 16) return;
    code_of_rank[node] = codebook.code_of_rank[node];
    if (node == 0) return;
    const int depth = 31 - __clz(node);
    const int index_in_level = node - (1 << depth);
    points[node] = codebook.decision_points[((2 * index_in_level + 1) << (3 - depth)) - 1];
  }

  /// The code of a value scaled to [-1, 1]. `kIdentity`: code_of_rank[i] == i.
  template <bool kIdentity>
  __device__ __forceinline__ uint32_t encode(float x) const {
    uint32_t node = 1;
#pragma unroll
    for (int step = 0; step < 4; ++step) node = 2 * node + (x > points[node] ? 1 : 0);
    const uint32_t rank = node - 16;
    return kIdentity ? rank : code_of_rank[rank];
  }
};

}  // namespace qlora_native::cuda
