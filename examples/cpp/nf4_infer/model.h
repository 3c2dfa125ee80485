// A Llama: its weights in the files that were mapped, its activations in fp32.
#pragma once

#include <filesystem>
#include <span>
#include <vector>

#include "attention.h"
#include "config.h"
#include "embedding.h"
#include "linear.h"
#include "rope.h"

namespace llama {

/// What the model has read so far: the keys and values of every layer.
struct Context {
  int64_t length = 0;
  int64_t capacity = 0;
  std::vector<KvCache> layers;
};

class Model {
 public:
  /// Opens the checkpoint in a folder. Throws std::runtime_error with the file and the tensor when
  /// something is missing or does not fit.
  explicit Model(const std::filesystem::path& folder);
  // Layers point into the weights.
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const Config& config() const { return config_; }

  /// An empty context for at most `capacity` tokens.
  Context new_context(int64_t capacity) const;

  /// Reads tokens, at least one, that follow those in `context`. Returns the logits [vocab_size] of
  /// the token after the last.
  std::vector<float> forward(std::span<const int64_t> tokens, Context& context);

 private:
  struct Layer {
    Layer(const Config& config, const Weights& weights, const std::string& name);

    std::vector<float> attention_norm, mlp_norm;
    Linear q, k, v, o, gate, up, down;
  };

  Matrix attend(const Layer& layer, const Matrix& x, KvCache& cache, int64_t first);
  Matrix feed_forward(const Layer& layer, const Matrix& x);

  Config config_;
  Weights weights_;
  Rope rope_;
  Embedding embedding_;
  std::vector<Layer> layers_;
  std::vector<float> norm_;
  Linear head_;
  Scratch scratch_;
};

}  // namespace llama
