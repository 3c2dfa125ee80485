// Decoding of pieces of W to fp32 for the matrix products, over a vector vocabulary `V`
// (simd_avx2.h, simd_avx512.h). In an unnamed namespace for the reason given in element.h.
#pragma once

#include <algorithm>
#include <bit>

#include "cpu/element.h"

namespace qlora_native::cpu {
namespace {

/// Floats past the last scale that decode_scales may write.
constexpr int64_t kScalePadding = 15;

/// Scales of blocks [first, first + count) to out, which has room for count + kScalePadding.
template <class V>
void decode_scales(const Absmax& absmax, int64_t first, int64_t count, float* out) {
  if (!absmax.is_double_quantized()) {
    std::memcpy(out, element_address(absmax.values, first, DType::kFloat32),
                static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const float offset = load_constant(absmax.offset, 0);
  int64_t done = 0;
  while (done < count) {
    const int64_t block = first + done;
    const int64_t left_in_group = kGroupSize - block % kGroupSize;
    const int64_t run = count - done < left_in_group ? count - done : left_in_group;
    V::decode_absmax(kSignedDynamicMap.values, absmax.codes + block, run,
                     load_constant(absmax.absmax2, block / kGroupSize), offset, out + done);
    done += run;
  }
}

/// Elements [begin, begin + count) in order. Writes a few elements more: `out` has room for `count`
/// rounded up to a multiple of 2 * V::kWidth.
template <class V>
void decode_run(const QuantizedView& weight, int64_t begin, int64_t count, float* out) {
  constexpr int64_t kUnit = 2 * V::kWidth;
  const typename V::Table values = V::load_table(weight.codebook.values);
  // A division would take as long as the decoding of a block of 64.
  const int log2_block_size = std::countr_zero(static_cast<uint64_t>(weight.block_size));
  int64_t done = 0;
  while (done < count) {
    int64_t element = begin + done;
    const int64_t block = element >> log2_block_size;
    const int64_t block_end = ((block + 1) << log2_block_size) - begin;
    const int64_t end = block_end < count ? block_end : count;
    const float scale = block_absmax(weight.absmax, block);
    if (element % 2 != 0) {
      out[done++] = weight.codebook.values[second_nibble(weight.packed[element / 2])] * scale;
      ++element;
    }
    const typename V::Table table = V::scale(values, scale);
    for (; done < end; done += kUnit, element += kUnit) {
      const uint8_t* bytes = weight.packed + element / 2;
      uint8_t tail[V::kWidth] = {};
      if (end - done < kUnit) {
        std::memcpy(tail, bytes, static_cast<size_t>((end - done + 1) / 2));
        bytes = tail;
      }
      typename V::Floats even;
      typename V::Floats odd;
      V::decode_pairs(bytes, table, &even, &odd);
      V::store_interleaved(out + done, even, odd);
    }
    done = end;
  }
}

/// `count` elements of an array to fp32, in order; `out` has room for `count`.
template <class V, DType kType>
void load_run(const void* data, int64_t begin, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) {
    V::store(out + i, V::template load_as_float<kType>(element_address(data, begin + i, kType)));
  }
  for (; i < count; ++i) out[i] = load_element(data, begin + i, kType);
}

template <class V>
void load_run(const void* data, int64_t begin, int64_t count, DType dtype, float* out) {
  if (dtype == DType::kFloat32) return load_run<V, DType::kFloat32>(data, begin, count, out);
  if (dtype == DType::kFloat16) return load_run<V, DType::kFloat16>(data, begin, count, out);
  return load_run<V, DType::kBFloat16>(data, begin, count, out);
}

}  // namespace
}  // namespace qlora_native::cpu
