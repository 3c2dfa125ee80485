#include "host/table_values.h"

namespace qlora_native::cuda {
namespace {

float table_scale(QuantType type, DType dtype) {
  switch (type) {
    case QuantType::kNF4:
      return dtype == DType::kBFloat16 ? 1.43675f : 1.88675f;
    case QuantType::kFP4:
      return 12.0f;
    case QuantType::kINT4:
      return 7.0f;
    default:
      return 1.0f;
  }
}

}  // namespace

bool has_table_values(const Codebook& codebook) { return codebook.type != QuantType::kCustom; }

TableValues table_values(const Codebook& codebook, DType dtype) {
  const float scale = table_scale(codebook.type, dtype);
  TableValues table{};
  for (int i = 0; i < 16; ++i) table.values[i] = codebook.values[i] * scale;
  table.scale_inverse = 1.0f / scale;
  return table;
}

}  // namespace qlora_native::cuda
