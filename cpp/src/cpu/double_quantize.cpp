// The second level of double quantization, shared by every quantize kernel.
//
// The offset is a sum of many values, so its last bits depend on the order. The order is fixed:
//   stage 1: partial[g], g = group of 256 blocks, is the pairwise tree over 256 fp64 slots
//            (a missing or non-finite absmax counts as 0):
//            for stride 128, 64, ..., 1: slot[i] += slot[i + stride];
//   stage 2: lane[j], j = 0..1023, is the sum of partial[j], partial[j + 1024], ... in this order;
//            then the same tree over the 1024 lanes, from stride 512;
//   offset = float(total / number of finite values).
#include <algorithm>
#include <atomic>

#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "nearest_code.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kLanes = 1024;
constexpr int64_t kGroupsPerTask = 32;

template <int64_t kSlots>
double tree_sum(double (&slots)[kSlots]) {
  for (int64_t stride = kSlots / 2; stride > 0; stride /= 2) {
    for (int64_t i = 0; i < stride; ++i) slots[i] += slots[i + stride];
  }
  return slots[0];
}

/// Stage 1 for one group; returns how many of its values are finite.
int64_t sum_group(const float* absmax, int64_t count, double* partial) {
  double slots[kGroupSize] = {};
  int64_t finite = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool counts = is_finite(absmax[i]);
    slots[i] = counts ? static_cast<double>(absmax[i]) : 0.0;
    finite += counts;
  }
  *partial = tree_sum(slots);
  return finite;
}

/// Stage 2.
double sum_partials(const double* partials, int64_t groups) {
  double lanes[kLanes] = {};
  for (int64_t g = 0; g < groups; ++g) lanes[g % kLanes] += partials[g];
  return tree_sum(lanes);
}

float mean_absmax(const float* absmax, int64_t blocks, double* partials) {
  std::atomic<int64_t> finite{0};
  parallel_for(num_groups(blocks), kGroupsPerTask, [&](int64_t first, int64_t last) {
    int64_t count = 0;
    for (int64_t g = first; g < last; ++g) {
      const int64_t begin = g * kGroupSize;
      count += sum_group(absmax + begin, std::min(kGroupSize, blocks - begin), partials + g);
    }
    finite += count;
  });
  const int64_t count = finite.load();
  return count == 0 ? 0.0f
                    : static_cast<float>(sum_partials(partials, num_groups(blocks)) /
                                         static_cast<double>(count));
}

void encode_group(const float* absmax, int64_t count, float offset, uint8_t* codes,
                  float* absmax2) {
  // As integers magnitudes order like floats, with infinity and NaN at the top.
  int32_t largest_bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = static_cast<int32_t>(float_bits(absmax[i] - offset) & 0x7fffffffu);
    largest_bits = std::max(largest_bits, bits);
  }
  const float largest = bits_float(static_cast<uint32_t>(largest_bits));
  const float reciprocal = 1.0f / largest;
  const bool has_codes = is_finite(largest) && is_finite(reciprocal);
  const float scale = !is_finite(largest) ? bits_float(kQuietNan) : has_codes ? largest : 0.0f;
  std::memcpy(absmax2, &scale, sizeof(scale));
  if (!has_codes) {
    std::memset(codes, kSignedDynamicZeroCode, static_cast<size_t>(count));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = nearest_code(kSignedCodeTable, (absmax[i] - offset) * reciprocal);
  }
}

}  // namespace

void double_quantize(const float* absmax, int64_t blocks, const float* pinned_offset,
                     const MutableAbsmax& out, double* partials) {
  const float offset =
      pinned_offset ? load_constant(pinned_offset, 0) : mean_absmax(absmax, blocks, partials);
  std::memcpy(out.offset, &offset, sizeof(offset));
  parallel_for(num_groups(blocks), kGroupsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      const int64_t begin = g * kGroupSize;
      encode_group(absmax + begin, std::min(kGroupSize, blocks - begin), offset, out.codes + begin,
                   out.absmax2 + g);
    }
  });
}

}  // namespace qlora_native::cpu
