// Element types of the arrays that cross the API.
#pragma once

#include <cstdint>

namespace qlora_native {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t size_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

constexpr const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "unknown";
}

}  // namespace qlora_native
