#include "host/mma_args.h"

#include <limits>

#include "host/launch.h"
#include "host/table_values.h"

namespace qlora_native::cuda {
namespace {

constexpr int64_t kUnit = 64;
constexpr size_t kAlignment = 16;
constexpr int64_t kMaxDepth = int64_t{1} << 30;  // bytes and elements of a row fit into an int

}  // namespace

bool suits_tensor_cores(const MatrixView& activations, const QuantizedView& weight,
                        std::string* why_not) {
  if (activations.dtype == DType::kFloat32) {
    *why_not = "the activations are float32, tensor cores take 16 bits";
  } else if (weight.cols == 0 || weight.cols % kUnit != 0 || weight.cols > kMaxDepth) {
    *why_not = "K = " + std::to_string(weight.cols) + " is not a multiple of 64 up to 2^30";
  } else if (weight.block_size < kUnit) {
    *why_not = "the block size " + std::to_string(weight.block_size) + " is below 64";
  } else if (weight.rows > std::numeric_limits<int32_t>::max() / 2 ||
             weight.rows * (weight.cols / kUnit) > std::numeric_limits<int32_t>::max()) {
    *why_not = "W has more than 2^31 units of 64 elements";
  } else if (!is_aligned(weight.packed, kAlignment)) {
    *why_not = "the packed weight is not aligned to 16 bytes";
  } else if (!is_aligned(activations.data, kAlignment) ||
             activations.row_stride * size_bytes(activations.dtype) % int64_t{kAlignment} != 0) {
    *why_not = "the rows of the activations are not aligned to 16 bytes";
  } else {
    return true;
  }
  return false;
}

bool suits_tables(const Codebook& codebook, std::string* why_not) {
  if (has_table_values(codebook)) return true;
  *why_not = "the values of a custom codebook may lose accuracy in 16 bits";
  return false;
}

bool supports_mma(const MatmulArgs& args, int64_t max_rows, std::string* why_not) {
  if (!suits_tables(args.weight.codebook, why_not)) return false;
  if (args.x.rows > max_rows) {
    *why_not = "x has " + std::to_string(args.x.rows) + " rows, it takes at most " +
               std::to_string(max_rows);
    return false;
  }
  return suits_tensor_cores(args.x, args.weight, why_not);
}

}  // namespace qlora_native::cuda
