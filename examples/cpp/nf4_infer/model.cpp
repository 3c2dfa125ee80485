#include "model.h"

#include <algorithm>
#include <stdexcept>

namespace llama {

namespace qn = qlora_native;

Model::Layer::Layer(const Config& config, const Weights& weights, const std::string& name)
    : attention_norm(
          load_vector(weights.files, name + ".input_layernorm.weight", config.hidden_size)),
      mlp_norm(load_vector(weights.files, name + ".post_attention_layernorm.weight",
                           config.hidden_size)),
      q(weights, name + ".self_attn.q_proj", config.hidden_size, config.heads * config.head_dim),
      k(weights, name + ".self_attn.k_proj", config.hidden_size, config.kv_heads * config.head_dim),
      v(weights, name + ".self_attn.v_proj", config.hidden_size, config.kv_heads * config.head_dim),
      o(weights, name + ".self_attn.o_proj", config.heads * config.head_dim, config.hidden_size),
      gate(weights, name + ".mlp.gate_proj", config.hidden_size, config.intermediate_size),
      up(weights, name + ".mlp.up_proj", config.hidden_size, config.intermediate_size),
      down(weights, name + ".mlp.down_proj", config.intermediate_size, config.hidden_size) {}

Model::Model(const std::filesystem::path& folder)
    : config_(Config::read(folder)),
      weights_{qn::SafetensorsCheckpoint(folder),
               qn::QuantizationConfig::read(folder / "config.json")},
      rope_(config_),
      embedding_(weights_, "model.embed_tokens", config_.vocab_size, config_.hidden_size),
      norm_(load_vector(weights_.files, "model.norm.weight", config_.hidden_size)),
      head_(weights_, config_.tie_word_embeddings ? "model.embed_tokens" : "lm_head",
            config_.hidden_size, config_.vocab_size) {
  for (int64_t i = 0; i < config_.layers; ++i) {
    layers_.emplace_back(config_, weights_, "model.layers." + std::to_string(i));
  }
}

Context Model::new_context(int64_t capacity) const {
  Context context;
  context.capacity = capacity;
  for (int64_t i = 0; i < config_.layers; ++i) {
    const Matrix empty(capacity, config_.kv_heads * config_.head_dim);
    context.layers.push_back({empty, empty});
  }
  return context;
}

std::vector<float> Model::forward(std::span<const int64_t> tokens, Context& context) {
  const auto count = static_cast<int64_t>(tokens.size());
  if (context.length + count > context.capacity) {
    throw std::runtime_error("the context holds " + std::to_string(context.capacity) + " tokens");
  }
  const auto epsilon = static_cast<float>(config_.rms_norm_eps);
  Matrix x = embedding_.look_up(tokens);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const Matrix normed = rms_norm(x, layer.attention_norm, epsilon);
    add(x, attend(layer, normed, context.layers[i], context.length));
    add(x, feed_forward(layer, rms_norm(x, layer.mlp_norm, epsilon)));
  }
  context.length += count;
  Matrix last(1, x.cols);
  std::copy_n(x.row(count - 1), x.cols, last.row(0));
  return head_.forward(rms_norm(last, norm_, epsilon), scratch_).values;
}

Matrix Model::attend(const Layer& layer, const Matrix& x, KvCache& cache, int64_t first) {
  Matrix queries = layer.q.forward(x, scratch_);
  Matrix keys = layer.k.forward(x, scratch_);
  const Matrix values = layer.v.forward(x, scratch_);
  for (int64_t row = 0; row < x.rows; ++row) {
    rope_.rotate(queries.row(row), config_.heads, first + row);
    rope_.rotate(keys.row(row), config_.kv_heads, first + row);
    std::copy_n(keys.row(row), keys.cols, cache.keys.row(first + row));
    std::copy_n(values.row(row), values.cols, cache.values.row(first + row));
  }
  return layer.o.forward(attention(config_, queries, cache, first), scratch_);
}

Matrix Model::feed_forward(const Layer& layer, const Matrix& x) {
  Matrix gate = layer.gate.forward(x, scratch_);
  silu_and_multiply(gate, layer.up.forward(x, scratch_));
  return layer.down.forward(gate, scratch_);
}

}  // namespace llama
