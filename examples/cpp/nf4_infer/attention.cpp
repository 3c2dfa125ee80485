#include "attention.h"

#include <algorithm>
#include <cmath>

namespace llama {
namespace {

/// Scores become shares that sum to one.
void softmax(std::vector<float>& scores) {
  const float largest = *std::ranges::max_element(scores);
  float sum = 0;
  for (float& score : scores) sum += score = std::exp(score - largest);
  for (float& score : scores) score /= sum;
}

}  // namespace

Matrix attention(const Config& config, const Matrix& queries, const KvCache& cache, int64_t first) {
  Matrix result(queries.rows, queries.cols);
  const int64_t dim = config.head_dim, sharing = config.heads / config.kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  std::vector<float> scores;
  for (int64_t row = 0; row < queries.rows; ++row) {
    for (int64_t head = 0; head < config.heads; ++head) {
      const float* const query = queries.row(row) + head * dim;
      const int64_t offset = head / sharing * dim;
      scores.assign(static_cast<size_t>(first + row + 1), 0.0f);
      for (size_t p = 0; p < scores.size(); ++p) {
        const float* const key = cache.keys.row(static_cast<int64_t>(p)) + offset;
        for (int64_t i = 0; i < dim; ++i) scores[p] += query[i] * key[i];
        scores[p] *= scale;
      }
      softmax(scores);
      float* const out = result.row(row) + head * dim;
      for (size_t p = 0; p < scores.size(); ++p) {
        const float* const value = cache.values.row(static_cast<int64_t>(p)) + offset;
        for (int64_t i = 0; i < dim; ++i) out[i] += scores[p] * value[i];
      }
    }
  }
  return result;
}

}  // namespace llama
