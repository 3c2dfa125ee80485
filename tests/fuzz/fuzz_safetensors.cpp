// Any bytes are a file whose tensors, and 4-bit matrices of them, lie inside of it, or
// InvalidArgument. Every byte that a result points to is read: the sanitizers see one that is not
// there.
#include <cstddef>
#include <cstdint>
#include <span>

#include "qlora_native/error.h"
#include "qlora_native/quantized_matrix.h"
#include "qlora_native/safetensors.h"
#include "require.h"

namespace {

using namespace qlora_native;

template <class T>
void touch(const T* values, int64_t count) {
  const auto bytes = std::as_bytes(std::span(values, static_cast<size_t>(count)));
  volatile unsigned sum = 0;
  for (const std::byte byte : bytes) sum = sum + std::to_integer<unsigned>(byte);
}

void touch(const QuantizedView& view) {
  const int64_t blocks = num_blocks(view.numel(), view.block_size);
  touch(view.packed, packed_bytes(view.numel()));
  if (view.absmax.values != nullptr) touch(view.absmax.values, blocks);
  if (!view.absmax.is_double_quantized()) return;
  touch(view.absmax.codes, blocks);
  touch(view.absmax.absmax2, num_groups(blocks));
  touch(view.absmax.offset, 1);
}

void load(const SafetensorsCheckpoint& checkpoint, const std::string& name) {
  for (const bool double_quant : {false, true}) {
    const QuantizationConfig config({.block_size = 32, .double_quant = double_quant});
    for (const auto shape : {std::optional<MatrixShape>(), std::optional(MatrixShape{3, 33})}) {
      try {
        touch(QuantizedMatrix::load(checkpoint, name, config, shape).view());
      } catch (const InvalidArgument&) {
        continue;
      }
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  try {
    const SafetensorsCheckpoint checkpoint(SafetensorsFile::over(bytes, "fuzz"));
    size_t total = 0;
    for (const SafetensorsTensor& tensor : checkpoint.tensors()) {
      touch(tensor.data.data(), static_cast<int64_t>(tensor.data.size()));
      total += tensor.data.size();
      require(tensor.numel() >= 0, "a size is not negative");
      require(checkpoint.find(tensor.name) == &tensor, "a tensor is found by its name");
      load(checkpoint, tensor.name);
    }
    require(total <= size, "tensors do not overlap");
  } catch (const InvalidArgument&) {
    return 0;
  }
  return 0;
}
