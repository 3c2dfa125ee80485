// From floats to codes: the absolute maximum on bit patterns, and the search of the decision
// points.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

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

// Two encoders of values scaled to [-1, 1]. Both have a table in shared memory, which the threads of
// the thread block fill from an image that the host made (a __syncthreads() must follow), and a
// small object per thread that reads it. Both make exactly the comparisons x > point that decide the
// code, so they agree with encode_4bit in every bit. `append` shifts a word of codes by one code and
// puts that of `x` into the free nibble.

/// For any codebook: the fifteen decision points as a search tree. Node i has the children 2i and
/// 2i + 1, the root is node 1, and four steps end at leaf 16 + rank. One read per step, free of
/// bank conflicts. About 26 instructions per value.
class DecisionTree {
 public:
  struct Table {
    float points[16];  ///< entry 0 is not used
    uint32_t code_of_rank[16];
  };
  using Image = Table;

  static Image image(const Codebook& codebook) {
    Image image{};
    for (int node = 1; node < 16; ++node) {
      const int depth = std::bit_width(static_cast<unsigned>(node)) - 1;
      const int index_in_level = node - (1 << depth);
      image.points[node] = codebook.decision_points[((2 * index_in_level + 1) << (3 - depth)) - 1];
    }
    for (int rank = 0; rank < 16; ++rank) image.code_of_rank[rank] = codebook.code_of_rank[rank];
    return image;
  }

  __device__ static __forceinline__ void fill(Table& table, const Image& image) {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= 16) return;
    table.points[i] = image.points[i];
    table.code_of_rank[i] = image.code_of_rank[i];
  }

  __device__ __forceinline__ explicit DecisionTree(const Table& table) : table_(table) {}

  __device__ __forceinline__ uint32_t append(uint32_t word, float x) const {
    uint32_t node = 1;
#pragma unroll
    for (int step = 0; step < 4; ++step) node = 2 * node + (x > table_.points[node] ? 1 : 0);
    return word << 4 | table_.code_of_rank[node - 16];
  }

 private:
  const Table& table_;
};

/// For codebooks whose code is the rank and whose decision points are far enough apart (`fits`):
/// [-1, 1] is cut into equal buckets with at most one point in each, so that one comparison
/// decides. Whether a rounded bucket index is off does not matter: it grows with x, and the points
/// were put into buckets by the same formula. Seven instructions per value, its scaling included.
///
/// A bucket lies sixteen times in the table, 128 bytes in all, so that each lane of a half-warp
/// reads its own pair of banks whatever the values are. x must not be NaN, nor far outside of
/// [-1, 1]: the bucket would lie outside of the table.
class BucketTable {
 public:
  struct alignas(8) Bucket {
    float point;    ///< the decision point inside, or infinity
    uint32_t rank;  ///< of a value in this bucket that is not above the point
  };
  static constexpr int kBuckets = 32;
  struct Image {
    Bucket buckets[kBuckets];
  };
  struct alignas(16) Table {
    Bucket buckets[kBuckets][16];
  };

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

  static Image image(const Codebook& codebook) {
    Image image;
    int point = 0;  // the first that does not lie below the bucket
    for (int i = 0; i < kBuckets; ++i) {
      while (point < 15 && bucket_of_point(codebook.decision_points[point]) < i) ++point;
      const bool is_inside = point < 15 && bucket_of_point(codebook.decision_points[point]) == i;
      image.buckets[i] = {
          is_inside ? codebook.decision_points[point] : std::numeric_limits<float>::infinity(),
          static_cast<uint32_t>(point)};
    }
    return image;
  }

  /// By the first 256 threads.
  __device__ static __forceinline__ void fill(Table& table, const Image& image) {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kBuckets * 8) return;
    const Bucket bucket = image.buckets[i / 8];
    const uint32_t point = __float_as_uint(bucket.point);
    reinterpret_cast<uint4*>(&table)[i] = make_uint4(point, bucket.rank, point, bucket.rank);
  }

  __device__ __forceinline__ explicit BucketTable(const Table& table)
      : base_(static_cast<uint32_t>(__cvta_generic_to_shared(&table)) + threadIdx.x % 16 * 8 -
              128 * kFirstBits) {}

  __device__ __forceinline__ uint32_t append(uint32_t word, float x) const {
    // One multiply-add makes the address from the bits: modulo 2^32 the constant falls away.
    const uint32_t address = __float_as_uint(fmaf(x, kScale, kShift)) * 128 + base_;
    float point;
    uint32_t rank;
    // Volatile keeps it behind the barrier that follows the filling of the table.
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=f"(point), "=r"(rank) : "r"(address));
    word = word * 16 + rank;
    // As C++ this becomes an addition and a conditional move.
    asm("{.reg .pred above; setp.gt.f32 above, %1, %2; @above add.u32 %0, %0, 1;}"
        : "+r"(word)
        : "f"(x), "f"(point));
    return word;
  }

 private:
  // 1.5 * 2^23 leaves no fraction bits: the sum's low bits are round(kScale * x), -15 to 15.
  static constexpr float kScale = 15.49f;
  static constexpr float kShift = 12582912.0f;
  static constexpr uint32_t kFirstBits = __builtin_bit_cast(uint32_t, kShift) - kBuckets / 2;

  /// The bucket of a decision point; -1 when it lies below every x, kBuckets when above.
  static int bucket_of_point(float point) {
    constexpr float kBound = 1.01f;  // x can exceed 1 by the rounding of x * (1 / absmax)
    if (point < -kBound) return -1;
    if (point > kBound) return kBuckets;
    return static_cast<int>(std::bit_cast<uint32_t>(std::fmaf(point, kScale, kShift)) - kFirstBits);
  }

  uint32_t base_;
};

}  // namespace qlora_native::cuda
