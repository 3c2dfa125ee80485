// What a Llama's config.json says of its shape.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

namespace llama {

/// Rotary positions: 1 / theta^(2i / head_dim) radians per token, scaled or not.
struct RopeConfig {
  /// "llama3": long wavelengths are stretched by `factor`, short ones stay, those between are mixed.
  struct Llama3 {
    double factor, low_freq_factor, high_freq_factor, original_max_positions;
  };
  double theta = 10000;
  double linear_factor = 1;  ///< "linear": all positions are divided by it
  std::optional<Llama3> llama3;
};

struct Config {
  int64_t vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads, head_dim;
  double rms_norm_eps;
  bool tie_word_embeddings;  ///< the output head is the table of embeddings
  RopeConfig rope;
  std::vector<int64_t> eos_tokens;  ///< any of them ends the text

  /// Reads config.json in the folder, and the tokens that end a text from generation_config.json if
  /// there is one. Throws std::runtime_error (qlora_native's errors are such too) with the path, the
  /// key and its value for what this program cannot run.
  static Config read(const std::filesystem::path& folder);
};

}  // namespace llama
