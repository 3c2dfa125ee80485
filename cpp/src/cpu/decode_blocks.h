// The loop over blocks of the vector dequantize kernels. A block has only sixteen values, so those
// are scaled and rounded once, and every element is a table lookup: the result of element-wise
// arithmetic for a fraction of its work. `Isa` brings
//   template <DType> class BlockTable { BlockTable(const float* values, float absmax);
//                                       void decode32(const uint8_t* packed, void* out) const; };
// In an unnamed namespace for the reason given in element.h.
#pragma once

#include "cpu/element.h"
#include "cpu/kernels.h"

namespace qlora_native::cpu {
namespace {

template <class Isa, DType kType>
void decode_whole_blocks(const DequantizeArgs& args, int64_t first, int64_t last) {
  const QuantizedView& weight = args.weight;
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * weight.block_size;
    const typename Isa::template BlockTable<kType> table(weight.codebook.values,
                                                         block_absmax(weight.absmax, block));
    for (int64_t i = 0; i < weight.block_size; i += 32) {
      table.decode32(weight.packed + (begin + i) / 2,
                     element_address(args.output.data, begin + i, kType));
    }
  }
}

template <class Isa>
void decode_blocks(const DequantizeArgs& args, int64_t first, int64_t last) {
  const int64_t whole_blocks = args.weight.numel() / args.weight.block_size;
  const int64_t whole_last = last < whole_blocks ? last : whole_blocks;
  switch (args.output.dtype) {
    case DType::kFloat32:
      decode_whole_blocks<Isa, DType::kFloat32>(args, first, whole_last);
      break;
    case DType::kFloat16:
      decode_whole_blocks<Isa, DType::kFloat16>(args, first, whole_last);
      break;
    case DType::kBFloat16:
      decode_whole_blocks<Isa, DType::kBFloat16>(args, first, whole_last);
      break;
  }
  decode_blocks_scalar(args, first > whole_last ? first : whole_last, last);
}

}  // namespace
}  // namespace qlora_native::cpu
