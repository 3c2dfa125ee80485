#include "config.h"

#include <qlora_native/json.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace llama {
namespace {

using qlora_native::Json;

/// An object of the file with names for messages. What is null counts as absent, as in Python.
class Section {
 public:
  Section(const Json& value, std::string where) : value_(value), where_(std::move(where)) {}

  [[noreturn]] void refuse(const std::string& key, const std::string& why) const {
    throw std::runtime_error(where_ + ": " + key + " " + why);
  }

  const Json* find(const std::string& key) const {
    const Json* const found = value_.find(key);
    return found == nullptr || found->is_null() ? nullptr : found;
  }

  int64_t size(const std::string& key, std::optional<int64_t> otherwise = std::nullopt) const {
    const Json* const found = find(key);
    if (found == nullptr && otherwise) return *otherwise;
    const auto number = found == nullptr ? std::nullopt : found->integer();
    if (!number) refuse(key, "is not an integer");
    if (*number < 1 || *number > std::numeric_limits<int32_t>::max()) {
      refuse(key, "is " + std::to_string(*number) + ", out of range");
    }
    return *number;
  }

  double number(const std::string& key, std::optional<double> otherwise = std::nullopt) const {
    const Json* const found = find(key);
    if (found == nullptr && otherwise) return *otherwise;
    const auto value = found == nullptr ? std::nullopt : found->number();
    if (!value || !(*value > 0)) refuse(key, "is not a number above zero");
    return *value;
  }

  bool flag(const std::string& key, bool otherwise) const {
    const Json* const found = find(key);
    if (found == nullptr) return otherwise;
    if (!found->boolean()) refuse(key, std::string("is ") + found->kind() + ", not a boolean");
    return *found->boolean();
  }

  std::string text(const std::string& key, const std::string& otherwise) const {
    const Json* const found = find(key);
    if (found == nullptr) return otherwise;
    if (found->string() == nullptr) {
      refuse(key, std::string("is ") + found->kind() + ", not a string");
    }
    return *found->string();
  }

  void expect(const std::string& key, const std::string& expected) const {
    const std::string actual = text(key, expected);
    if (actual != expected) {
      refuse(key, "is \"" + actual + "\"; this program knows \"" + expected + "\" only");
    }
  }

 private:
  const Json& value_;
  std::string where_;
};

/// transformers 5 keeps everything in "rope_parameters"; before, theta stood outside.
RopeConfig read_rope(const Section& config, const std::string& where) {
  RopeConfig rope;
  rope.theta = config.number("rope_theta", rope.theta);
  const Json* value = config.find("rope_parameters");
  const std::string key = value == nullptr ? "rope_scaling" : "rope_parameters";
  if (value == nullptr) value = config.find(key);
  if (value == nullptr) return rope;
  const Section parameters(*value, where + ": " + key);
  rope.theta = parameters.number("rope_theta", rope.theta);
  const std::string type = parameters.text("rope_type", parameters.text("type", "default"));
  if (type == "llama3") {
    rope.llama3 = {parameters.number("factor"), parameters.number("low_freq_factor"),
                   parameters.number("high_freq_factor"),
                   parameters.number("original_max_position_embeddings")};
  } else if (type == "linear") {
    rope.linear_factor = parameters.number("factor");
  } else if (type != "default") {
    parameters.refuse("rope_type",
                      "is \"" + type + "\"; this program knows default, linear and llama3");
  }
  return rope;
}

/// A number, a list of numbers, or nothing.
std::vector<int64_t> read_tokens(const Section& section, const std::string& key) {
  std::vector<int64_t> tokens;
  const Json* const value = section.find(key);
  if (value == nullptr) return tokens;
  const auto add = [&](const Json& token) {
    if (!token.integer()) section.refuse(key, "is neither a token nor a list of tokens");
    tokens.push_back(*token.integer());
  };
  if (value->array() == nullptr) {
    add(*value);
  } else {
    for (const Json& token : *value->array()) add(token);
  }
  return tokens;
}

}  // namespace

Config Config::read(const std::filesystem::path& folder) {
  const std::string path = (folder / "config.json").string();
  const Json file = Json::read(path);
  const Section section(file, path);
  section.expect("model_type", "llama");
  section.expect("hidden_act", "silu");
  Config config = {};
  config.vocab_size = section.size("vocab_size");
  config.hidden_size = section.size("hidden_size");
  config.intermediate_size = section.size("intermediate_size");
  config.layers = section.size("num_hidden_layers");
  config.heads = section.size("num_attention_heads");
  config.kv_heads = section.size("num_key_value_heads", config.heads);
  config.head_dim = section.size("head_dim", config.hidden_size / config.heads);
  config.rms_norm_eps = section.number("rms_norm_eps", 1e-6);
  config.tie_word_embeddings = section.flag("tie_word_embeddings", false);
  config.rope = read_rope(section, path);
  if (config.heads % config.kv_heads != 0) {
    section.refuse("num_key_value_heads", "is " + std::to_string(config.kv_heads) +
                                              ", which does not divide the " +
                                              std::to_string(config.heads) + " heads");
  }
  if (config.head_dim % 2 != 0) {
    section.refuse("head_dim", "is " + std::to_string(config.head_dim) + ", an odd number");
  }
  const std::filesystem::path generation = folder / "generation_config.json";
  if (std::filesystem::exists(generation)) {
    const Json settings = Json::read(generation);
    config.eos_tokens = read_tokens({settings, generation.string()}, "eos_token_id");
  } else {
    config.eos_tokens = read_tokens(section, "eos_token_id");
  }
  return config;
}

}  // namespace llama
