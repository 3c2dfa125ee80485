#include "embedding.h"

#include <qlora_native/dequantize.h>

#include <algorithm>
#include <stdexcept>

namespace llama {
namespace {

namespace qn = qlora_native;

/// The scale of a block, by the formula of quantized.h.
float scale_of(const qn::Absmax& absmax, int64_t block) {
  if (!absmax.is_double_quantized()) return absmax.values[block];
  const float scaled =
      qn::kSignedDynamicMap.values[absmax.codes[block]] * absmax.absmax2[block / qn::kGroupSize];
  return scaled + *absmax.offset;
}

/// Decodes one row: the blocks that it is in, taken for a matrix of their own.
void read_row(const qn::QuantizedView& table, int64_t row, float* out) {
  const int64_t begin = row * table.cols, end = begin + table.cols;
  const int64_t first = begin / table.block_size, last = (end - 1) / table.block_size;
  std::vector<float> scales;
  for (int64_t block = first; block <= last; ++block) {
    scales.push_back(scale_of(table.absmax, block));
  }
  qn::QuantizedView blocks = table;
  blocks.packed += first * table.block_size / 2;
  blocks.absmax = {.values = scales.data()};
  blocks.rows = 1;
  blocks.cols = std::min((last + 1) * table.block_size, table.numel()) - first * table.block_size;
  std::vector<float> decoded(static_cast<size_t>(blocks.cols));
  qn::dequantize_4bit(
      {.weight = blocks, .output = {decoded.data(), blocks.cols, qn::DType::kFloat32, {}}},
      qn::Stream::none());
  std::copy_n(decoded.begin() + (begin - first * table.block_size), table.cols, out);
}

}  // namespace

Embedding::Embedding(const Weights& weights, const std::string& name, int64_t vocabulary,
                     int64_t size)
    : vocabulary_(vocabulary),
      size_(size),
      table_(load_weight(weights, name + ".weight", vocabulary, size)) {}

Matrix Embedding::look_up(std::span<const int64_t> tokens) const {
  Matrix rows(static_cast<int64_t>(tokens.size()), size_);
  for (int64_t i = 0; i < rows.rows; ++i) {
    const int64_t token = tokens[static_cast<size_t>(i)];
    if (token < 0 || token >= vocabulary_) {
      throw std::runtime_error("token " + std::to_string(token) + " is not in the vocabulary of " +
                               std::to_string(vocabulary_));
    }
    if (const auto* dense = std::get_if<DenseMatrix>(&table_)) {
      dense->read_row(token, rows.row(i));
    } else {
      read_row(std::get<qn::QuantizedMatrix>(table_).view(), token, rows.row(i));
    }
  }
  return rows;
}

}  // namespace llama
