// The loop over blocks of the vector quantize kernels. `Isa` brings
//   template <DType> static float largest_magnitude(const void* data, int64_t count);
//   class Encoder { explicit Encoder(const Codebook&);
//                   template <DType>
//                   void encode32(const void* data, float factor, uint8_t* packed) const; };
// In an unnamed namespace for the reason given in element.h.
#pragma once

#include "cpu/element.h"
#include "cpu/kernels.h"

namespace qlora_native::cpu {
namespace {

template <class Isa, DType kType>
void encode_whole_blocks(const QuantizeArgs& args, int64_t first, int64_t last, float* absmax) {
  const int64_t block_size = args.output.block_size;
  const typename Isa::Encoder encoder(args.output.codebook);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * block_size;
    const void* data = element_address(args.input.data, begin, kType);
    const float largest = Isa::template largest_magnitude<kType>(data, block_size);
    const float reciprocal = 1.0f / largest;
    if (!is_finite(largest) || !is_finite(reciprocal)) {
      encode_blocks_scalar(args, block, block + 1, absmax);
      continue;
    }
    absmax[block] = largest;
    for (int64_t i = 0; i < block_size; i += 32) {
      encoder.template encode32<kType>(element_address(data, i, kType), reciprocal,
                                       args.output.packed + (begin + i) / 2);
    }
  }
}

template <class Isa>
void encode_blocks(const QuantizeArgs& args, int64_t first, int64_t last, float* absmax) {
  const int64_t whole_blocks = args.output.numel() / args.output.block_size;
  const int64_t whole_last = last < whole_blocks ? last : whole_blocks;
  switch (args.input.dtype) {
    case DType::kFloat32:
      encode_whole_blocks<Isa, DType::kFloat32>(args, first, whole_last, absmax);
      break;
    case DType::kFloat16:
      encode_whole_blocks<Isa, DType::kFloat16>(args, first, whole_last, absmax);
      break;
    case DType::kBFloat16:
      encode_whole_blocks<Isa, DType::kBFloat16>(args, first, whole_last, absmax);
      break;
  }
  encode_blocks_scalar(args, first > whole_last ? first : whole_last, last, absmax);
}

}  // namespace
}  // namespace qlora_native::cpu
