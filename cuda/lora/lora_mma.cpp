#include "lora/lora_mma.h"

#include "host/launch.h"

namespace qlora_native::cuda {
namespace {

constexpr int64_t kVectorElems = 8;  // 16 bytes

/// Whether rows can be accessed by 16 bytes.
bool has_vector_rows(const char* label, const void* data, int64_t cols, int64_t row_stride,
                     std::string* why_not) {
  if (is_aligned(data, 16) && cols % kVectorElems == 0 && row_stride % kVectorElems == 0) {
    return true;
  }
  *why_not = std::string("the rows of ") + label + " (" + std::to_string(cols) + " elements, " +
             std::to_string(row_stride) + " apart) are not whole units of 16 aligned bytes";
  return false;
}

bool suits(DType dtype, int64_t rank, std::string* why_not) {
  if (dtype == DType::kFloat32) {
    *why_not = "the dtype is float32, tensor cores take 16 bits";
  } else if (rank > kMaxMmaRank) {
    *why_not =
        "the rank is " + std::to_string(rank) + ", it takes at most " + std::to_string(kMaxMmaRank);
  } else {
    return true;
  }
  return false;
}

}  // namespace

bool supports_lora_project_mma(const LoraProjectArgs& args, std::string* why_not) {
  return suits(args.x.dtype, args.t.cols, why_not) &&
         has_vector_rows("x", args.x.data, args.x.cols, args.x.row_stride, why_not);
}

bool supports_lora_update_mma(const LoraUpdateArgs& args, std::string* why_not) {
  return suits(args.y.dtype, args.t.cols, why_not) &&
         has_vector_rows("y", args.y.data, args.y.cols, args.y.row_stride, why_not);
}

bool supports_lora_gradient_mma(const LoraGradientArgs& args, std::string* why_not) {
  return suits(args.v.dtype, args.s.cols, why_not) &&
         has_vector_rows("v", args.v.data, args.v.cols, args.v.row_stride, why_not) &&
         has_vector_rows("s", args.s.data, args.s.cols, args.s.row_stride, why_not);
}

}  // namespace qlora_native::cuda
