// The table of token embeddings, 4-bit or dense.
#pragma once

#include <cstdint>
#include <span>

#include "linear.h"

namespace llama {

class Embedding {
 public:
  /// The table NAME.weight [vocabulary, size].
  Embedding(const Weights& weights, const std::string& name, int64_t vocabulary, int64_t size);

  /// A row per token. Throws std::runtime_error for a token that is not in the vocabulary.
  Matrix look_up(std::span<const int64_t> tokens) const;

 private:
  int64_t vocabulary_, size_;
  Weight table_;
};

}  // namespace llama
