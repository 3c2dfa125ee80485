// From the public argument structs to what kernels take: scales, and template arguments chosen at
// run time. Only for .cu files.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>

#include "device/decode.cuh"
#include "qlora_native/dtype.h"
#include "qlora_native/error.h"
#include "qlora_native/quantized.h"

namespace qlora_native::cuda {

inline int block_shift(int64_t block_size) {
  return std::countr_zero(static_cast<uint64_t>(block_size));
}

inline BlockScales block_scales(const QuantizedView& weight) {
  return {weight.absmax.values, weight.absmax.codes, weight.absmax.absmax2, weight.absmax.offset,
          block_shift(weight.block_size)};
}

template <class T>
struct TypeTag {
  using type = T;
};

/// Calls `visitor` with the TypeTag of the CUDA type of `dtype`.
template <class Visitor>
void visit_dtype(DType dtype, const Visitor& visitor) {
  switch (dtype) {
    case DType::kFloat32:
      return visitor(TypeTag<float>{});
    case DType::kFloat16:
      return visitor(TypeTag<__half>{});
    case DType::kBFloat16:
      return visitor(TypeTag<__nv_bfloat16>{});
  }
  throw InvalidArgument("unknown dtype code " + std::to_string(static_cast<int32_t>(dtype)));
}

/// The same for the 16-bit types, of which `dtype` is one.
template <class Visitor>
void visit_16bit_dtype(DType dtype, const Visitor& visitor) {
  if (dtype == DType::kFloat16) {
    visitor(TypeTag<__half>{});
  } else {
    visitor(TypeTag<__nv_bfloat16>{});
  }
}

/// Calls `visitor` with std::true_type or std::false_type.
template <class Visitor>
void visit_bool(bool value, const Visitor& visitor) {
  if (value) {
    visitor(std::true_type{});
  } else {
    visitor(std::false_type{});
  }
}

}  // namespace qlora_native::cuda
