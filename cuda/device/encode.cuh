// From floats to codes: the absolute maximum on bit patterns, and the search of the decision
// points.
#pragma once

#include <cmath>
#include <cstdint>

#include "qlora_native/codebook.h"

namespace qlora_native::cuda {

inline constexpr uint32_t kInfinityBits = 0x7f800000u;
inline constexpr uint32_t kNaNBits = 0x7fc00000u;

/// |x| as bits: unsigned comparison orders finite values as floats, and puts infinity and NaN
/// above.
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

// Two encoders of values scaled to [-1, 1]. Both live in shared memory, are filled by the first
// threads of the thread block (a __syncthreads() must follow), and make exactly the comparisons x >
// point that decide the code, so they agree with encode_4bit in every bit.

/// For any codebook: the fifteen decision points as a search tree. Node i has the children 2i and
/// 2i + 1, the root is node 1, and four steps end at leaf 16 + rank. One read per step, free of
/// bank conflicts. About 26 instructions per value.
struct DecisionTree {
  float points[16];  ///< entry 0 is not used
  uint32_t code_of_rank[16];

  __device__ __forceinline__ void fill(const Codebook& codebook) {
    const int node = static_cast<int>(threadIdx.x);
    if (node >= 16) return;
    code_of_rank[node] = codebook.code_of_rank[node];
    if (node == 0) return;
    const int depth = 31 - __clz(node);
    const int index_in_level = node - (1 << depth);
    points[node] = codebook.decision_points[((2 * index_in_level + 1) << (3 - depth)) - 1];
  }

  __device__ __forceinline__ uint32_t encode(float x) const {
    uint32_t node = 1;
#pragma unroll
    for (int step = 0; step < 4; ++step) node = 2 * node + (x > points[node] ? 1 : 0);
    return code_of_rank[node - 16];
  }
};

/// For codebooks whose code is the rank and whose decision points are far enough apart (`fits`):
/// [-1, 1] is cut into equal buckets with at most one point in each, so that one comparison
/// decides. Whether a rounded bucket index is off does not matter: it grows with x, and the points
/// were put into buckets by the same formula. About 8 instructions per value.
struct BucketTable {
  struct alignas(8) Bucket {
    float point;    ///< the decision point inside, or infinity
    uint32_t rank;  ///< of a value in this bucket that is not above the point
  };
  static constexpr int kBuckets = 64;  ///< 33 are in use
  Bucket buckets[kBuckets];

  /// In 0..32 for x in [-1, 1]; in 0..63 for any x, NaN included.
  __host__ __device__ static __forceinline__ uint32_t bucket_of(float x) {
    // 1.5 * 2^23 leaves no fraction bits: the sum's low bits are round(16 x) + 16.
    return __builtin_bit_cast(uint32_t, fmaf(x, 16.0f, 12582912.0f + 16.0f)) % kBuckets;
  }

  /// The bucket of a decision point; -1 when it lies below every x, kBuckets when above.
  __host__ __device__ static __forceinline__ int bucket_of_point(float point) {
    constexpr float kBound = 1.01f;  // x can exceed 1 by the rounding of x * (1 / absmax)
    if (point < -kBound) return -1;
    return point > kBound ? kBuckets : static_cast<int>(bucket_of(point));
  }

  static bool fits(const Codebook& codebook) {
    for (int rank = 0; rank < 16; ++rank) {
      if (codebook.code_of_rank[rank] != rank) return false;
    }
    // The points ascend: two in one bucket are neighbours.
    for (int i = 0; i + 1 < 15; ++i) {
      const int bucket = bucket_of_point(codebook.decision_points[i]);
      const bool is_shared = bucket == bucket_of_point(codebook.decision_points[i + 1]);
      if (is_shared && bucket >= 0 && bucket < kBuckets) return false;
    }
    return true;
  }

  __device__ __forceinline__ void fill(const Codebook& codebook) {
    const int index = static_cast<int>(threadIdx.x);
    if (index >= kBuckets) return;
    Bucket bucket{__uint_as_float(kInfinityBits), 0};
#pragma unroll
    for (int i = 0; i < 15; ++i) {
      const float point = codebook.decision_points[i];
      const int place = bucket_of_point(point);
      if (place == index) bucket.point = point;
      if (place < index) ++bucket.rank;
    }
    buckets[index] = bucket;
  }

  __device__ __forceinline__ uint32_t encode(float x) const {
    const Bucket bucket = buckets[bucket_of(x)];
    return bucket.rank + (x > bucket.point ? 1 : 0);
  }
};

}  // namespace qlora_native::cuda
